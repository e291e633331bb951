"""Calls that come again, answered without Python over shared memory: the same answers, and nobody is kept waiting."""

from __future__ import annotations

import itertools
import socket
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.untrusted.calls import CHECKPOINT, CONFIG
from tests.untrusted.patient_calls import PatientCalls
from tests.wire.links import WAIT_S
from tests.wire.shm_peers import opening, raw_client, read_to_end
from tsqp.arith.few_rows import FewRowsKernel
from tsqp.arith.modulus import P
from tsqp.config.dtype import NumericPath
from tsqp.config.groups import group_keys, linear_groups
from tsqp.errors import WorkerLost
from tsqp.untrusted.compiled_calls import MESSAGES, CompiledCalls, loops_for
from tsqp.untrusted.paths.call_table import FIRST_CALLS, CallTable
from tsqp.untrusted.paths.field import FieldOperators
from tsqp.untrusted.paths.plain import Operators
from tsqp.untrusted.store import WeightStore
from tsqp.untrusted.worker import Worker
from tsqp.wire.channel import Arrival, Departure, Frames, Listener
from tsqp.wire.codec import decode_handshake, decode_reply, encode
from tsqp.wire.messages import PROTOCOL_VERSION, Call, Done, Failed, Hello, Linear, Product, Welcome
from tsqp.wire.payload import tensor_bytes, wire_format
from tsqp.wire.slot import Slot
from tsqp.wire.transport import connect, listen
from tsqp.wire.transport.shm.channel import ShmChannel

pytestmark = pytest.mark.skipif(not FewRowsKernel.supported(), reason="no vpdpbusd here")

CPU = torch.device("cpu")
STORE = WeightStore(CHECKPOINT, "bfloat16", CPU, kernel=FewRowsKernel())
QKV = linear_groups(CONFIG)["qkv"]


class Watched(Worker):
    """Counts what was answered in Python, and keeps what was not answered at all."""

    def __init__(self, calls: CompiledCalls | None) -> None:
        super().__init__(STORE, calls)
        self.in_python = 0
        self.departed = threading.Event()
        self.failures: list[BaseException] = []

    def serve(self, listener: Listener) -> None:
        try:
            super().serve(Reporting(listener, self.departed))
        except BaseException as error:
            self.failures.append(error)
            raise

    def answer(self, arrival: Arrival) -> Frames | None:
        self.in_python += 1
        return super().answer(arrival)


class Reporting:
    """A listener that says when somebody has gone."""

    def __init__(self, listener: Listener, departed: threading.Event) -> None:
        self._listener, self._departed = listener, departed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._listener, name)

    def receive(self, timeout_s: float | None) -> Any:
        event = self._listener.receive(timeout_s)
        if isinstance(event, Departure):
            self._departed.set()
        return event


class Client:
    """The trusted side of a connection, which keeps a slot for each shape of call."""

    def __init__(self, address: str, path: NumericPath = "field") -> None:
        channel = connect(address, arena_bytes=64 << 20)
        assert isinstance(channel, ShmChannel)
        self.channel, self.path, self._ids = channel, path, 0
        self._slots: dict[tuple[int, int], Slot] = {}
        channel.send(Frames(encode(Hello(PROTOCOL_VERSION, CHECKPOINT.fingerprint(), "bfloat16", path))))
        assert isinstance(decode_handshake(channel.receive(WAIT_S).control), Welcome)

    def call(self, name: str, layer: int | None, rows: int, digits: int = 4) -> tuple[Done, bytes, bytes]:
        """What was sent, and what came back."""
        group, self._ids = linear_groups(CONFIG)[name], self._ids + 1  # type: ignore[index]
        shape = (rows, group.in_features)
        message: Call
        if self.path == "float":
            x, message = torch.randn(shape).bfloat16(), Linear(self._ids, name, layer, None, rows)  # type: ignore[arg-type]
        else:
            dtype, most = (torch.int32, P) if digits == 4 else (torch.int16, 30_000)
            x = torch.randint(0, most, shape, dtype=dtype)
            message = Product(self._ids, name, layer, rows, digits)  # type: ignore[arg-type]
        size, reply_bytes = x.nbytes, rows * group.out_features * (2 if self.path == "float" else 4)
        slot = self._slots.get((size, reply_bytes)) or self.channel.slot(size, reply_bytes)
        self._slots[size, reply_bytes] = slot
        slot.tensor[:] = tensor_bytes(x)
        self.channel.send_from(slot, encode(message))
        control, (product,) = self.channel.receive(WAIT_S)
        done = decode_reply(control)
        assert isinstance(done, Done)
        assert done.id == self._ids
        return done, bytes(slot.tensor), bytes(product)

    def close(self) -> None:
        self._slots.clear()
        self.channel.close()


class Served(ExitStack):
    """A worker on a thread, and how to be its client."""

    def __init__(self, directory: Path, *, compiled: bool = True) -> None:
        super().__init__()
        listener = self.enter_context(closing(listen(f"shm://{directory}/worker.sock")))
        self.listener = listener
        self.calls = self.enter_context(closing(PatientCalls())) if compiled else None
        self.worker = Watched(self.calls)
        paths: tuple[NumericPath, ...] = ("field", "float")
        for path in paths:  # so that no client waits for a compiler
            self.worker.prepare(path)
        self.thread = threading.Thread(target=self.worker.serve, args=(listener,))
        self.thread.start()
        self.callback(self.end)

    def end(self) -> None:
        self.listener.interrupt()
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        assert not self.worker.failures

    def in_python(self) -> int:
        """How many calls were answered in Python, but for those that the loop knew and did not wait for."""
        return self.worker.in_python - (self.calls.waited if self.calls is not None else 0)

    @contextmanager
    def client(self, path: NumericPath = "field") -> Iterator[Client]:
        with closing(Client(self.listener.address, path)) as client:
            yield client


@pytest.fixture
def private_dir(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


@pytest.fixture
def served(private_dir: Path) -> Iterator[Served]:
    with Served(private_dir) as served:
        yield served


def expected(path: NumericPath, name: str, layer: int | None, rows: int, digits: int, x: bytes) -> bytes:
    """The plain way's product."""
    weights: Any = STORE.prepare(path)
    operators: Any = FieldOperators(weights) if path == "field" else Operators(weights, wire_format("bfloat16"))
    field = Product(1, name, layer, rows, digits)  # type: ignore[arg-type]
    call = field if path == "field" else Linear(1, name, layer, None, rows)  # type: ignore[arg-type]
    return bytes(operators(call, [memoryview(bytearray(x))]))


# The same answers


@pytest.mark.parametrize(("path", "digits"), [("field", 4), ("field", 2), ("float", 0)])
def test_every_call_has_the_bits_of_the_plain_way(served: Served, path: NumericPath, digits: int) -> None:
    shapes = [(key, rows) for rows in (1, 2, 3, 8 if digits else 4) for key in group_keys(CONFIG)]
    with served.client(path) as client:
        for turn in range(3):
            for (name, layer), rows in shapes:
                _, x, y = client.call(name, layer, rows, digits)
                assert y == expected(path, name, layer, rows, digits, x), (turn, name, layer, rows)
        first = 1 + len(shapes)  # the hello, and each call for the first time
        assert served.worker.in_python >= first
        if loops_for(STORE.prepare(path)):
            assert served.in_python() <= first
        else:  # of a processor without loops for floats
            assert served.in_python() == 1 + 3 * len(shapes)


def test_without_the_loop_every_call_is_answered_in_python(private_dir: Path) -> None:
    with Served(private_dir, compiled=False) as served, served.client() as client:
        for _ in range(5):
            _, x, y = client.call("qkv", 0, 1)
            assert y == expected("field", "qkv", 0, 1, 4, x)
        assert served.worker.in_python == 6


def test_calls_that_come_in_any_order(served: Served) -> None:
    """Also those of which only some are known, between others that are never prepared."""
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3)).tolist()
    with served.client() as client:
        for number in [*order, *reversed(order), *order]:
            name, layer = group_keys(CONFIG)[number % 9]
            rows = 1 + number % 5 if number % 7 else 17
            _, x, y = client.call(name, layer, rows)
            assert y == expected("field", name, layer, rows, 4, x)


def test_more_calls_than_a_table_begins_with(served: Served) -> None:
    shapes = [(key, rows, digits) for key in group_keys(CONFIG) for rows in range(1, 11) for digits in (2, 4)]
    assert len(shapes) > FIRST_CALLS
    with served.client() as client:
        for _ in range(2):
            for (name, layer), rows, digits in shapes:
                _, x, y = client.call(name, layer, rows, digits)
                assert y == expected("field", name, layer, rows, digits, x)
        assert served.in_python() <= 1 + len(shapes) <= served.worker.in_python


def test_threads_share_a_product(private_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsqp.arith.few_rows.LEAST_WEIGHTS", 1)
    torch.set_num_threads(3)
    try:
        with Served(private_dir) as served, served.client() as client:
            for _ in range(50):
                _, x, y = client.call("gate_up", 1, 2)
                assert y == expected("field", "gate_up", 1, 2, 4, x)
            assert served.in_python() <= 2 <= served.worker.in_python
    finally:
        torch.set_num_threads(1)


def test_how_long_it_computed_is_said(served: Served) -> None:
    with served.client() as client:
        client.call("gate_up", 0, 1)
        for rows in (1, 1, 1):
            done, _, _ = client.call("gate_up", 0, rows)
            assert 0 < done.busy_ns < WAIT_S * 1e9


# What it does not know


def test_what_is_not_prepared_is_answered_in_between(served: Served) -> None:
    with served.client() as client:
        for _ in range(3):
            client.call("qkv", 0, 1)
            client.channel.send(Frames(encode(Product(7, "qkv", 99, 1, 4)), (memoryview(bytes(4)),)), 4)
            failed = decode_reply(client.channel.receive(WAIT_S).control)
            assert isinstance(failed, Failed)
            _, x, y = client.call("qkv", 0, 1)
            assert y == expected("field", "qkv", 0, 1, 4, x)


def test_garbage_gets_no_answer_and_ends_nothing(served: Served) -> None:
    with served.client() as client:
        client.call("qkv", 0, 1)
        for garbage in (b"", b"\xc1", bytes(4096), encode(Product(2**62 - 1, "qkv", 0, 1, 4))[:-1]):
            client.channel.send(Frames(garbage))
            client.call("qkv", 0, 1)


@pytest.mark.parametrize("packet", [b"", b"\xc1", bytes(63), bytes([9]) * 64, bytes(100_000)], ids=len)
def test_an_unsound_packet_in_the_middle_costs_its_connection_and_no_other(served: Served, packet: bytes) -> None:
    with served.client() as other, served.client() as client:
        for _ in range(3):
            client.call("qkv", 0, 1)
        client.channel._line.send(packet)
        with pytest.raises(WorkerLost):
            client.call("qkv", 0, 1)
        assert served.worker.departed.wait(WAIT_S)
        for _ in range(3):
            other.call("qkv", 0, 1)


def test_a_client_that_reads_nothing_loses_its_connection(served: Served) -> None:
    with served.client() as client, served.client() as other:
        client.call("qkv", 0, 1)
        packet, _ = client.channel.packet(next(iter(client._slots.values())), encode(Product(2**40, "qkv", 0, 1, 4)))
        client.channel._line.setblocking(True)

        def call_for_ever() -> None:
            for number in itertools.count(1000):
                client.channel._line.send(number.to_bytes(8, "little") + packet[8:])

        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            call_for_ever()
        assert served.worker.departed.wait(WAIT_S)
        other.call("qkv", 0, 1)


# Who comes, who goes, who waits


def test_two_clients_at_once(served: Served) -> None:
    """Each has memory of its own: what one sends is never multiplied for the other."""
    counts: Counter[int] = Counter()
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with served.client() as client:
                for _ in range(60):
                    _, x, y = client.call("qkv", number % 2, 1)
                    assert y == expected("field", "qkv", number % 2, 1, 4, x)
                    counts[number] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert not failures
    assert counts == {0: 60, 1: 60, 2: 60}


@contextmanager
def busy(served: Served) -> Iterator[Client]:
    """A client that never stops calling, in the background."""
    enough = threading.Event()
    with served.client() as client:
        client.call("qkv", 0, 1)
        slot = next(iter(client._slots.values()))
        packet, _ = client.channel.packet(slot, encode(Product(2**40, "qkv", 0, 1, 4)))

        def call() -> None:
            """Some dozen requests are always there, so that the worker never finds nothing."""
            line, number = client.channel._line, 10
            line.setblocking(True)
            try:
                for _ in range(2 * MESSAGES):
                    line.send((number := number + 1).to_bytes(8, "little") + packet[8:])
                while not enough.is_set() and line.recv(8192):
                    line.send((number := number + 1).to_bytes(8, "little") + packet[8:])
            except OSError:
                pass  # the worker has ended

        thread = threading.Thread(target=call)
        thread.start()
        try:
            yield client
        finally:
            enough.set()
            with suppress(OSError):
                client.channel._line.shutdown(socket.SHUT_RDWR)  # the worker may have stopped answering
            thread.join(WAIT_S)
            assert not thread.is_alive()


def test_a_busy_client_keeps_nobody_out(served: Served) -> None:
    with busy(served), served.client() as other:
        _, x, y = other.call("o", 0, 1)
        assert y == expected("field", "o", 0, 1, 4, x)
        assert served.thread.is_alive()


def test_a_busy_worker_hears_that_it_shall_stop(served: Served) -> None:
    with busy(served):
        served.end()


def test_an_idle_worker_hears_that_it_shall_stop(served: Served) -> None:
    with served.client() as client:
        for _ in range(3):
            client.call("qkv", 0, 1)
        served.end()


def test_a_connection_that_ends_is_forgotten(served: Served) -> None:
    with served.client() as client:
        for _ in range(3):
            client.call("qkv", 0, 1)
    assert served.worker.departed.wait(WAIT_S)
    with served.client() as client:  # by its answer the departure has been dealt with
        assert len(served.worker._connections) == 1


def test_a_client_that_is_killed_in_the_middle_of_a_call(served: Served) -> None:
    """Its socket closes with a call under way, whose answer nobody takes."""
    with served.client() as client, served.client() as other:
        for _ in range(3):
            client.call("lm_head", None, 1)
        slot = next(iter(client._slots.values()))
        client.channel.send_from(slot, encode(Product(9, "lm_head", None, 1, 4)))
        client.close()
        assert served.worker.departed.wait(WAIT_S)
        other.call("qkv", 0, 1)


def test_a_client_that_opens_nothing_is_no_reason_to_wait(served: Served) -> None:
    with raw_client(served.listener.address), served.client() as client:
        for _ in range(3):
            client.call("qkv", 0, 1)
        with raw_client(served.listener.address) as line:
            line.send(opening())  # without memory
            assert read_to_end(line)
        client.call("qkv", 0, 1)


def test_memory_that_changes_while_it_is_multiplied(served: Served) -> None:
    """The product means nothing, and nothing else happens."""
    enough = threading.Event()
    with served.client() as client:
        client.call("gate_up", 0, 2)
        slot = next(iter(client._slots.values()))

        def change() -> None:
            fill = 0
            while not enough.is_set():
                fill = (fill + 1) % 256
                slot.tensor[:] = bytes([fill]) * slot.tensor.nbytes

        thread = threading.Thread(target=change)
        thread.start()
        try:
            for _ in range(50):
                client.call("gate_up", 0, 2)
        finally:
            enough.set()
            thread.join()
    with served.client() as client:
        _, x, y = client.call("gate_up", 0, 2)
        assert y == expected("field", "gate_up", 0, 2, 4, x)


# Tables


def test_a_table_that_is_cleared_keeps_no_memory() -> None:
    weights: Any = STORE.prepare("field")
    operators = FieldOperators(weights)
    payload = memoryview(bytearray(4 * QKV.in_features))
    out = memoryview(bytearray(4 * QKV.out_features))
    operators(Product(1, "qkv", 0, 1, 4), [payload], out, b"a place")
    table = operators.prepared.table
    assert len(table) == 1
    kept = weakref.ref(table._kept[0])
    table.clear()
    assert kept() is not None, "the plain way still has it"
    operators.prepared._runs.clear()
    assert kept() is None
    assert (len(table), table.digit_bytes) == (0, 0)


def test_a_key_that_is_too_long_is_not_kept() -> None:
    weights: Any = STORE.prepare("field")
    x, y = torch.zeros(1, QKV.in_features, dtype=torch.int32), torch.zeros(1, QKV.out_features, dtype=torch.int32)
    group = weights.groups["qkv", 0]
    work = group.kernel.prepared(x, 4, group.wq, group.offsets, y)
    table = CallTable()
    table.add(bytes(128), Product(1, "qkv", 0, 1, 4), work)
    assert len(table) == 0
    table.add(bytes(56), Product(1, "qkv", 0, 1, 4), work)
    assert len(table) == 1
