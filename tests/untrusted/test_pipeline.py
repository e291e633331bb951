"""Calls that are under way together, on one device or on several: in order, each with its own memory, its own failure
and its answer.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch

from tests.untrusted.calls import CHECKPOINT, CONFIG
from tests.untrusted.fake_driver import FakeDriver, FakeEvent, FakeHost
from tests.untrusted.many_devices import devices_of, serving_on
from tests.untrusted.shm_worker import STORE, Watched, connected, fake_backend, serving
from tests.wire.links import WAIT_S
from tsqp.config.groups import linear_groups
from tsqp.errors import DeviceError, WorkerLost
from tsqp.model.weights import ModelWeights
from tsqp.untrusted.backends.driver import Stream
from tsqp.untrusted.paths.plain import Operators
from tsqp.wire.channel import Channel, Frames, Listener
from tsqp.wire.codec import decode_reply, encode
from tsqp.wire.messages import Begin, Done, Failed, Finish, Layer, Linear, Place, StagedDone
from tsqp.wire.payload import tensor_bytes, wire_format
from tsqp.wire.slot import Slot
from tsqp.wire.transport import new_ipc_address

QKV = linear_groups(CONFIG)["qkv"]
MANY, FEW = 40, 3  # rows: launched, and as a graph


class Recording(FakeDriver):
    """Says what was asked of it, in order, and can hold the device until so many calls have been copied in."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.said: list[str] = []
        self.failing: set[int] = set()  # events whose work fails, by how many were waited for before
        self.waited = 0

    def hold(self, calls: int) -> None:
        """No call is done before so many have begun from now on."""
        begun = self.said.count("in") + calls
        self.late = lambda: self.said.count("in") < begun

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        inwards = self._is_locked(source)
        super().copy(target, source, stream)
        self.said.append("in" if inwards else "out")

    def synchronise(self, event: FakeEvent) -> None:
        self.said.append("wait")
        self.waited += 1
        super().synchronise(event)
        if self.waited in self.failing:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


def expected(rows: int, seed: int, layer: int = 0) -> bytes:
    weights = STORE.prepare("float")
    assert isinstance(weights, ModelWeights)
    found = Operators(weights, wire_format("float32"))(Linear(1, "qkv", layer, None, rows), [payload(rows, seed)])
    assert isinstance(found, memoryview)
    return bytes(found)


def payload(rows: int, seed: int) -> memoryview:
    random = torch.Generator().manual_seed(seed)
    return tensor_bytes(torch.randn(rows, CONFIG.hidden_size, generator=random))


@contextmanager
def serving_with(
    count: int, kind: type[Recording] = Recording, *, address: str | None = None, **options: Any
) -> Iterator[tuple[Listener, Watched, list[Recording]]]:
    """A worker on so many devices, whose drivers are of this kind; ``options`` are theirs."""
    host = FakeHost()
    drivers = [kind(host=host, **options) for _ in range(count)]
    if count == 1:
        serving_all = serving(fake_backend(drivers[0], window_bytes=1 << 20), address)
    else:
        serving_all = serving_on(devices_of(drivers, 1 << 20), "float", address=address)
    with serving_all as (listener, worker):
        yield listener, worker, drivers


class Asking:
    """Calls from slots of a connection, whose answers are looked at later."""

    def __init__(self, channel: Channel) -> None:
        self._channel, self._numbers = channel, itertools.count(1)
        self._slots: dict[int, Slot] = {}
        self._free: dict[int, list[Slot]] = {}

    def ask(self, rows: int, seed: int, *, part: int | None = None, reply_rows: int | None = None) -> int:
        free = self._free.setdefault(rows, [])
        room = (rows if reply_rows is None else reply_rows) * QKV.out_features * 4
        slot = free.pop() if free and reply_rows is None else self._channel.slot(payload(rows, seed).nbytes, room)
        slot.tensor[:] = payload(rows, seed).cast("B")
        number = next(self._numbers)
        self._slots[number] = slot
        self._channel.send_from(slot, encode(Linear(number, "qkv", 0, part, rows)))
        return number

    def answer(self) -> tuple[int, bytes | str]:
        """The next answer: the number of its call, and its product, or why there is none."""
        frames = self._channel.receive(WAIT_S)
        reply = decode_reply(frames.control)
        if isinstance(reply, Failed):
            return reply.id, reply.reason
        assert isinstance(reply, Done)
        return reply.id, b"".join(bytes(tensor) for tensor in frames.tensors)


DEVICES = pytest.mark.parametrize("count", [1, 3])


@DEVICES
@pytest.mark.parametrize("rows", [MANY, FEW])
@pytest.mark.parametrize("transport", ["shm", "ipc"])
@pytest.mark.parametrize("refusal", [None, "no"])
def test_the_next_call_is_copied_in_before_the_one_before_it_is_waited_for(
    count: int, rows: int, transport: str, refusal: str | None
) -> None:
    """One client with three calls under way, as with micro-batches."""
    address = new_ipc_address() if transport == "ipc" else None
    with (
        serving_with(count, address=address, refusal=refusal) as (listener, _, drivers),
        connected(listener) as channel,
    ):
        client = Asking(channel)
        for turn in range(3):
            before = [len(driver.said) for driver in drivers]
            for driver in drivers:
                driver.hold(3)
            asked = [client.ask(rows, 10 * turn + n) for n in range(3)]
            found = [client.answer() for _ in asked]
            assert found == [(number, expected(rows, 10 * turn + n)) for n, number in enumerate(asked)]
            for driver, first in zip(drivers, before, strict=True):
                said = driver.said[first:]
                assert said.index("wait") > [n for n, one in enumerate(said) if one == "in"][2]
    assert all(driver.idle for driver in drivers)


@DEVICES
def test_two_clients_are_interleaved_and_each_has_its_own_answers(count: int) -> None:
    with serving_with(count) as (listener, _, drivers), ExitStack() as stack:
        clients = [Asking(stack.enter_context(connected(listener))) for _ in range(2)]
        for turn in range(4):
            for driver in drivers:
                driver.hold(2)
            rows = MANY if turn % 2 else FEW
            asked = [client.ask(rows, 10 * turn + n) for n, client in enumerate(clients)]
            for n, client in enumerate(clients):
                assert client.answer() == (asked[n], expected(rows, 10 * turn + n))


@DEVICES
def test_no_more_than_a_few_calls_are_under_way(count: int) -> None:
    with serving_with(count) as (listener, _, drivers), connected(listener) as channel:
        for driver in drivers:
            driver.late = lambda: True  # the device never says that it is done: whoever wants room has to wait
        client = Asking(channel)
        asked = [client.ask(MANY, n) for n in range(7)]
        found = [client.answer() for _ in range(4)]
        for driver in drivers:
            driver.late = lambda: False
        found += [client.answer() for _ in range(3)]
        assert found == [(number, expected(MANY, n)) for n, number in enumerate(asked)]
    for driver in drivers:
        assert driver.said[: driver.said.index("wait")].count("in") == 3


@DEVICES
def test_a_failure_on_the_way_is_answered_in_its_turn_and_is_no_other_calls(count: int) -> None:
    with serving_with(count) as (listener, _, drivers), connected(listener) as channel:
        client = Asking(channel)
        for driver in drivers:
            driver.hold(3 if count == 1 else 2)  # several are given nothing of a call that does not fit
        asked = [client.ask(MANY, 1), client.ask(MANY, 2, reply_rows=1), client.ask(MANY, 3)]
        found = [client.answer() for _ in asked]
    assert [number for number, _ in found] == asked
    assert found[0][1] == expected(MANY, 1)
    assert isinstance(found[1][1], str)
    assert found[2][1] == expected(MANY, 3)


@pytest.mark.parametrize(("count", "broken"), [(1, 0), (3, 0), (3, 2)])
def test_what_the_device_reports_belongs_to_the_call_that_was_waited_for(count: int, broken: int) -> None:
    with serving_with(count) as (listener, _, drivers), connected(listener) as channel:
        client = Asking(channel)
        for driver in drivers:
            driver.hold(3)
        drivers[broken].failing = {2}
        asked = [client.ask(MANY, n) for n in range(3)]
        found = [client.answer() for _ in asked]
        assert client.ask(MANY, 3) == 4
        assert client.answer() == (4, expected(MANY, 3))
        probed = 1  # each device, after what one has reported
        assert [driver.waited for driver in drivers] == [4 + probed] * count, "whatever has failed on another"
    assert found[0] == (asked[0], expected(MANY, 0))
    assert found[1] == (asked[1], "CUDA error: an illegal memory access was encountered")
    assert found[2] == (asked[2], expected(MANY, 2))


class Broken(Recording):
    """Fails once what it holds has begun, and then for ever, as CUDA does."""

    def done(self, event: FakeEvent) -> bool:
        if self.late():
            return False
        raise RuntimeError("CUDA error: unspecified launch failure")

    def synchronise(self, event: FakeEvent) -> None:
        super().synchronise(event)
        raise RuntimeError("CUDA error: unspecified launch failure")


@DEVICES
def test_a_worker_whose_device_has_failed_for_good_answers_what_is_under_way_and_ends(count: int) -> None:
    """While it went on, clients would find a worker that greets them and fails each call, and nobody would act."""
    why = "CUDA error: unspecified launch failure"

    def ask_two() -> None:
        with serving_with(count, Broken) as (listener, _, drivers), connected(listener) as channel:
            client = Asking(channel)
            for driver in drivers:
                driver.hold(2)
            asked = [client.ask(MANY, n) for n in range(2)]
            assert [client.answer() for _ in asked] == [(number, why) for number in asked]
            with pytest.raises(WorkerLost):
                channel.receive(WAIT_S)

    with pytest.raises(DeviceError, match=rf"^(cpu|cuda:0) has failed for good \({why}\).* start the worker again$"):
        ask_two()


class Crowded(Recording):
    """Has memory for one call at a time."""

    def empty(self, size: int, stream: Stream) -> torch.Tensor:
        if not self.idle:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().empty(size, stream)


@DEVICES
def test_what_finds_no_memory_beside_others_is_tried_again_alone(count: int) -> None:
    with serving_with(count, Crowded) as (listener, _, drivers), connected(listener) as channel:
        client = Asking(channel)
        for driver in drivers[:1]:  # the others are given nothing before it has room
            driver.hold(2)
        asked = [client.ask(MANY, n) for n in range(2)]
        assert [client.answer() for _ in asked] == [(number, expected(MANY, n)) for n, number in enumerate(asked)]


def test_the_time_of_a_call_begins_when_the_call_before_it_has_ended() -> None:
    """Otherwise a trace would show calls that are under way together as computed at the same time."""
    driver = Recording()
    with serving(fake_backend(driver, window_bytes=1 << 20)) as (listener, _), connected(listener) as channel:
        client = Asking(channel)
        driver.hold(3)
        held, together = driver.late, list[float]()

        def late() -> bool:
            """All three are under way together for a while."""
            if not held():
                together.append(time.perf_counter())
            return not together or time.perf_counter() < together[0] + 0.05

        driver.late = late
        began = time.perf_counter_ns()
        asked = [client.ask(MANY, n) for n in range(3)]
        busy = []
        for _ in asked:
            reply = decode_reply(channel.receive(WAIT_S).control)
            assert isinstance(reply, Done)
            busy.append(reply.busy_ns)
        assert sum(busy) <= time.perf_counter_ns() - began


def test_an_answer_says_when_each_stage_of_it_was_done() -> None:
    """Of a call that is copied and computed on streams of their own; a graph is one stretch on one stream."""
    driver = Recording()
    with serving(fake_backend(driver, window_bytes=1 << 20)) as (listener, _), connected(listener) as channel:
        client = Asking(channel)
        client.ask(MANY, 0)
        reply = decode_reply(channel.receive(WAIT_S).control)
        assert isinstance(reply, StagedDone)
        (begun, copied), (computing, computed), (leaving, gone) = reply.stages
        assert begun == 0
        assert begun < copied < computing < computed < leaving < gone
        slot, replies = channel.slot(payload(FEW, 0).nbytes, FEW * QKV.out_features * 4), list[type]()
        for number in range(2, 5):  # launched as it comes first, then a graph
            channel.send_from(slot, encode(Linear(number, "qkv", 0, None, FEW)))
            replies.append(type(decode_reply(channel.receive(WAIT_S).control)))
        assert replies == [StagedDone, Done, Done]


def test_calls_that_keep_state_are_done_in_their_order() -> None:
    """All calls of two passes are sent at once, as the layer partition does."""
    driver = Recording()
    with serving(fake_backend(driver)) as (listener, _), connected(listener) as channel:
        numbers = itertools.count(1)

        def send_pass(position: int, rows: int) -> list[int]:
            begin = next(numbers)
            sent = [begin]
            tokens = tensor_bytes(torch.arange(rows, dtype=torch.int32))
            channel.send(Frames(encode(Begin(begin, (Place(1, position, rows),), 64)), [tokens]), 0)
            for layer in range(CONFIG.num_layers):
                sent.append(next(numbers))
                channel.send(Frames(encode(Layer(sent[-1], begin, layer, 0))), 0)
            sent.append(next(numbers))
            channel.send(Frames(encode(Finish(sent[-1], begin, False))), CONFIG.vocab_size * 4)
            return sent

        sent = [*send_pass(0, 5), *send_pass(5, 1), *send_pass(6, 1)]
        replies = [decode_reply(channel.receive(WAIT_S).control) for _ in sent]
        assert all(isinstance(reply, Done) for reply in replies)
        assert [reply.id for reply in replies] == sent
    assert driver.idle


CLIENT = """
import sys
from tsqp.wire.channel import Frames
from tsqp.wire.codec import encode
from tsqp.wire.messages import PROTOCOL_VERSION, Hello, Linear
from tsqp.wire.transport import connect
address, fingerprint, size, reply, rows = sys.argv[1:]
channel = connect(address, arena_bytes=1 << 20)
channel.send(Frames(encode(Hello(PROTOCOL_VERSION, fingerprint, "float32", "float"))))
channel.receive(100)
for number in (1, 2):
    slot = channel.slot(int(size), int(reply))
    channel.send_from(slot, encode(Linear(number, "qkv", 0, None, int(rows))))
print("asked", flush=True)
sys.stdin.read()
"""


@DEVICES
def test_a_client_that_is_killed_with_calls_under_way_leaves_nothing(count: int) -> None:
    with serving_with(count) as (listener, worker, drivers):
        for driver in drivers:
            driver.late = lambda: True  # so that they are under way when it is gone
        sizes = [str(payload(MANY, 0).nbytes), str(MANY * QKV.out_features * 4), str(MANY)]
        arguments = [sys.executable, "-c", CLIENT, listener.address, CHECKPOINT.fingerprint(), *sizes]
        with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == b"asked\n"
            client.kill()
        assert worker.left.acquire(timeout=WAIT_S)
        for driver in drivers:
            assert driver.registered == {}
            assert driver.idle
            driver.late = lambda: False
        with connected(listener) as channel:
            asking = Asking(channel)
            assert asking.ask(MANY, 1) == 1
            assert asking.answer() == (1, expected(MANY, 1))


@DEVICES
def test_a_worker_that_is_told_to_stop_answers_what_is_under_way(count: int) -> None:
    with serving_with(count) as (listener, _, drivers), connected(listener) as channel:
        for driver in drivers:
            driver.late = lambda: True
        client = Asking(channel)
        number = client.ask(MANY, 1)
        while not all("in" in driver.said for driver in drivers):
            pass
        listener.interrupt()
        assert client.answer() == (number, expected(MANY, 1))
