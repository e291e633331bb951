"""A worker on several fake devices: answers are those of one, and all have their work before one is waited for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.untrusted.calls import CHECKPOINT, CONFIG, HELLO, answer, arrival, greet
from tests.untrusted.device_calls import CALLS, HIDDEN, NAMES, QKV, STORE, on_the_cpu, payload_of
from tests.untrusted.fake_driver import FakeDriver, FakeHost, ProtocolViolation
from tests.untrusted.many_devices import drivers_of, fake_devices, owned_store, serving_on
from tests.untrusted.shm_worker import CLIENT, connected, failure, product
from tests.wire.links import WAIT_S
from tsqp import LLM, ComputeConfig, SamplingParams, WorkerConfig
from tsqp.config.dtype import NumericPath, WireDtype
from tsqp.config.groups import LAYER_GROUPS, GroupName, linear_groups
from tsqp.config.partition import PartitionName
from tsqp.config.protection import ProtectionName
from tsqp.errors import ModelMismatch, OptionError, ProtocolError
from tsqp.model.weights import ModelWeights
from tsqp.untrusted.backends.driver import Stream
from tsqp.untrusted.paths.many_weights import check_features
from tsqp.untrusted.paths.plain import Operators
from tsqp.untrusted.store import ManyStore, WeightStore, store_on
from tsqp.untrusted.worker import Worker
from tsqp.wire.device_memory import DeviceMemory
from tsqp.wire.messages import (
    PROTOCOL_VERSION,
    Begin,
    Call,
    Done,
    Embed,
    Failed,
    Hello,
    Linear,
    MultiplyPads,
    Place,
    Product,
    Welcome,
)
from tsqp.wire.payload import wire_format
from tsqp.wire.transport import new_ipc_address

DEVICES = pytest.mark.parametrize("count", [2, 3, 5])


@pytest.mark.parametrize(("path", "call"), CALLS, ids=NAMES)
@pytest.mark.parametrize(("count", "where"), [(2, "locked"), (2, "refused"), (2, "ipc"), (3, "locked"), (5, "locked")])
def test_answers_are_those_of_one_device_to_the_bit(path: NumericPath, call: Call, where: str, count: int) -> None:
    """Three times: as it comes first, and twice as graphs, one on each device, where it can be."""
    devices = fake_devices(count, refusal="no" if where == "refused" else None)
    payload = payload_of(call, dtype=torch.bfloat16 if path == "int8" else torch.float32)
    expected = on_the_cpu(path, call, payload)
    address = new_ipc_address() if where == "ipc" else None
    with serving_on(devices, path, address=address) as (listener, _), connected(listener, path) as channel:
        assert product(channel, call, payload, len(expected), times=3) == [expected] * 3
        drivers = drivers_of(devices)
        holders = [driver for driver in drivers if driver.synchronised]
        assert all(driver.synchronised == 3 for driver in holders)
    assert all(driver.idle for driver in drivers)
    assert not drivers[0].registered
    alone = isinstance(call, Embed)
    whole = not alone and getattr(call, "part", None) is None
    assert holders == drivers if whole else holders
    few = isinstance(call, Linear | Product) and call.rows <= 16 and where != "ipc"
    assert {(driver.captured, driver.replayed) for driver in holders} == {(1, 2) if few else (0, 0)}
    if whole:
        many = where == "locked" and getattr(call, "rows", 33) > 1
        assert all((driver.strips > 0) == many for driver in drivers)


@DEVICES
@pytest.mark.parametrize("name", [*LAYER_GROUPS, "lm_head"])
def test_every_group_and_part_is_there_whole(name: GroupName, count: int) -> None:
    """Over parts that lie on one device, on several, and on none of some."""
    devices = fake_devices(count)
    worker, cpu = Worker(owned_store(devices, "float", "field")), Worker(STORE)
    layer = None if name == "lm_head" else 1
    group = linear_groups(CONFIG)[name]
    random = torch.Generator().manual_seed(1)
    x = torch.randint(-4, 5, (3, group.in_features), generator=random).float()
    numbers = torch.randint(0, 2**31 - 1, (3, group.in_features), dtype=torch.int32, generator=random)
    for hello, calls, payload in (
        (HELLO, [Linear(1, name, layer, part, 3) for part in (None, *range(len(group.parts)))], x),
        (Hello(PROTOCOL_VERSION, HELLO.fingerprint, "float32", "field"), [Product(1, name, layer, 3, 4)], numbers),
    ):
        with served(worker, devices, hello):
            for call in calls:
                found, expected = (bytes_of(one, hello, call, payload) for one in (worker, cpu))
                assert found == expected


@contextmanager
def served(worker: Worker, devices: object, hello: Hello) -> Iterator[None]:
    with torch.inference_mode(), devices.serving():  # type: ignore[attr-defined]
        assert isinstance(greet(worker, hello), Welcome)
        yield


def bytes_of(worker: Worker, hello: Hello, call: Call, payload: torch.Tensor) -> bytes:
    greet(worker, hello)
    frames = worker.answer(arrival(call, payload))
    assert frames is not None
    return bytes(frames.tensors[0])


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
def test_rows_of_other_formats_are_put_together_before_they_are_converted(wire: WireDtype) -> None:
    devices = fake_devices(3)
    x = torch.randint(-4, 5, (3, HIDDEN)).float()  # sums of such numbers by these weights are near, not equal
    payload = memoryview(bytearray(wire_format(wire).size((3, HIDDEN))))
    wire_format(wire).write(x, payload)
    call = Linear(1, "qkv", 0, None, 3)
    expected = Operators(ModelWeights.load(CHECKPOINT, "float32", torch.device("cpu")), wire_format(wire))(
        call, [payload]
    )
    assert isinstance(expected, memoryview)
    out = memoryview(bytearray(wire_format(wire).size((3, QKV.out_features))))
    with devices.serving():
        assert owned_store(devices, "float").operators("float", wire)(call, [payload], out) is out
        assert bytes(out) != bytes(expected), "nothing is there before it is waited for"
        devices.settle()
    assert bytes(out) == bytes(expected)


def test_rows_that_the_host_puts_together_are_those_of_their_call() -> None:
    """Two calls under way together, whose floats are converted once the devices are done with each."""
    devices, wire, random = fake_devices(3), wire_format("int8"), torch.Generator().manual_seed(5)
    plain = Operators(ModelWeights.load(CHECKPOINT, "float32", torch.device("cpu")), wire)
    begun = []
    with devices.serving():
        operators = owned_store(devices, "float").operators("float", "int8")
        for rows in (3, 5):
            call, payload = Linear(1, "qkv", 0, None, rows), memoryview(bytearray(wire.size((rows, HIDDEN))))
            wire.write(torch.randint(-4, 5, (rows, HIDDEN), generator=random).float(), payload)
            out = memoryview(bytearray(wire.size((rows, QKV.out_features))))
            operators(call, [payload], out)
            begun.append((devices.submit(), out, plain(call, [payload])))
        for queued, out, expected in begun:
            assert isinstance(expected, memoryview)
            assert bytes(out) == bytes(len(out)), "nothing is there before it is waited for"
            queued.wait()
            assert bytes(out) == bytes(expected)


@pytest.mark.parametrize("call", [Linear(1, "qkv", 0, None, 1), Embed(1, 1)], ids=["shared", "alone"])
def test_memory_of_one_device_is_refused(call: Call) -> None:
    devices = fake_devices(2)
    there, here = DeviceMemory(1 << 20, HIDDEN * 4), memoryview(bytearray(HIDDEN * 4))
    with devices.serving():
        operators = owned_store(devices, "float").operators("float", "float32")
        for payload, out in ((there, None), (here, there)):
            with pytest.raises(ProtocolError, match="memory of a device, and this worker computes on cuda:0,cuda:1"):
                operators(call, [payload], out)


class Told(FakeDriver):
    """Says in which order devices are given work, and waited for."""

    def __init__(self, host: FakeHost, said: list[str]) -> None:
        super().__init__(host=host)
        self.said = said

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        self.said.append(stream.value)
        super().copy(target, source, stream)

    def synchronise(self, event: object) -> None:
        self.said.append("wait")
        super().synchronise(event)


@pytest.mark.parametrize(
    ("path", "call"),
    [
        ("float", Linear(1, "qkv", 0, None, 40)),
        ("field", Product(1, "qkv", 0, 40, 4)),
        ("field", MultiplyPads(1, "qkv", 0, 33)),
    ],
)
def test_all_devices_have_their_work_before_one_is_waited_for(path: NumericPath, call: Call) -> None:
    devices = fake_devices(3, window_bytes=1 << 20)
    said: list[str] = []
    for driver in drivers_of(devices):
        driver.__class__ = Told
        driver.said = said  # type: ignore[attr-defined]
    payload = payload_of(call)
    with serving_on(devices, path) as (listener, _), connected(listener, path) as channel:
        said.clear()
        product(channel, call, payload, len(on_the_cpu(path, call, payload)))
    first = said.index("wait")
    blocks = 3 if isinstance(call, MultiplyPads) else 1
    assert said[:first].count("in") == 3 * blocks
    assert said[:first].count("out") >= 3
    assert said[first : first + 3] == ["wait"] * 3
    if blocks > 1:  # each block goes to all before the next is expanded
        assert said[: 3 * blocks] == ["in"] * (3 * blocks)


def test_a_dealers_keys_are_expanded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from tsqp.untrusted.paths import field

    expanded, expand = list[int](), field.expand_blocks

    def counted(keys: memoryview, columns: int) -> torch.Tensor:
        expanded.append(keys.nbytes)
        return expand(keys, columns)

    monkeypatch.setattr(field, "expand_blocks", counted)
    devices = fake_devices(3)
    call = MultiplyPads(1, "qkv", 0, 33)
    worker = Worker(owned_store(devices, "field"))
    with served(worker, devices, Hello(PROTOCOL_VERSION, HELLO.fingerprint, "float32", "field")):
        keys = torch.zeros(33, 32, dtype=torch.uint8)
        assert isinstance(answer(worker, call, keys), Done)
    assert expanded == [16 * 32, 16 * 32, 32]


def test_rows_are_rounded_up_on_each_device() -> None:
    devices = fake_devices(3)
    with serving_on(devices, "field") as (listener, _), connected(listener, "field") as channel:
        for rows in (16, 9, 12, 3, 4):
            call = Product(1, "qkv", 0, rows, 4)
            payload = payload_of(call, rows)
            expected = on_the_cpu("field", call, payload)
            assert product(channel, call, payload, len(expected), times=2) == [expected] * 2
    assert [driver.captured for driver in drivers_of(devices)] == [2, 2, 2]  # for 16 rows and for 4


def test_the_device_without_room_is_named_and_the_worker_goes_on() -> None:
    devices = fake_devices(3)
    drivers = drivers_of(devices)
    drivers[1].room = 10_000
    with serving_on(devices, "float") as (listener, _), connected(listener) as channel:
        large = Linear(1, "qkv", 1, None, 100)
        reason = failure(channel, large, payload_of(large), 100 * QKV.out_features * 4)
        assert reason == "cuda:1 is out of memory: there was no room for call linear, group qkv, layer 1, rows 100"
        assert all(driver.idle for driver in drivers), "the client writes there again"
        assert [driver.trimmed for driver in drivers] == [1, 1, 1]
        small = Linear(2, "qkv", 1, None, 1)
        expected = on_the_cpu("float", small, payload_of(small))
        assert product(channel, small, payload_of(small), len(expected), times=2) == [expected] * 2


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_device_that_fails_stops_no_other_and_all_are_waited_for(broken: int) -> None:
    devices = fake_devices(3)
    drivers = drivers_of(devices)
    call = Product(1, "qkv", 0, 20, 4)
    expected = on_the_cpu("field", call, payload_of(call))
    with serving_on(devices, "field") as (listener, _), connected(listener, "field") as channel:
        drivers[broken].failure = RuntimeError("CUDA error: an illegal memory access\nand so on")
        reason = failure(channel, call, payload_of(call), len(expected))
        assert reason == "CUDA error: an illegal memory access"
        assert [driver.synchronised for driver in drivers] == [2, 2, 2]  # once more to see whether all still work
        assert all(driver.idle for driver in drivers)
        assert devices.failed == f"cuda:{broken}"
        assert product(channel, call, payload_of(call), len(expected)) == [expected]


def test_the_first_of_two_errors_is_named() -> None:
    devices = fake_devices(3)
    worker = Worker(owned_store(devices, "float"))
    x = torch.zeros(3, HIDDEN)
    with served(worker, devices, HELLO):
        for driver in drivers_of(devices)[1:]:
            driver.failure = torch.OutOfMemoryError("CUDA out of memory.")
        reply = answer(worker, Linear(1, "qkv", 0, None, 3), x)
    assert isinstance(reply, Failed)
    assert reply.reason.startswith("cuda:1 is out of memory")


def test_a_client_that_is_killed_leaves_nothing_locked() -> None:
    devices = fake_devices(3)
    driver = drivers_of(devices)[0]
    call = Product(1, "qkv", 0, 1, 4)
    expected = on_the_cpu("field", call, payload_of(call))
    with serving_on(devices, "field") as (listener, worker):
        arguments = [listener.address, CHECKPOINT.fingerprint(), str(HIDDEN * 4), str(len(expected))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([sys.executable, "-c", CLIENT, *arguments], **pipes) as client:  # type: ignore[call-overload]
            assert client.stdout.readline() == b"answered\n"
            assert driver.registered
            client.kill()
        assert worker.left.acquire(timeout=WAIT_S)
        assert driver.registered == {}
        with connected(listener, "field") as channel:
            assert product(channel, call, payload_of(call), len(expected)) == [expected]


def test_memory_is_unlocked_once_no_device_copies_there() -> None:
    devices = fake_devices(2)
    memory = memoryview(bytearray(1 << 15))
    devices.attach(b"peer", memory)
    with devices.serving():
        with devices.using(1) as backend:
            backend.stage_out(backend.stage_in(memory[:64], torch.uint8, (64,)) + 1, memory[64:128])
        assert not drivers_of(devices)[1].idle
        assert drivers_of(devices)[0].registered
        devices.detach(b"peer")  # the fake refuses it before
    assert not drivers_of(devices)[0].registered
    assert bytes(memory[64:128]) == bytes([1] * 64)


@pytest.mark.parametrize(
    ("protection", "partition"),
    [
        ("open", "op"),
        pytest.param("open", "linear", marks=pytest.mark.slow),
        pytest.param("masked", "linear", marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_a_worker_on_one_device(protection: ProtectionName, partition: PartitionName) -> None:
    compute = ComputeConfig(partition=partition, dtype="float32" if protection == "open" else "auto")
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    found = []
    for count in (1, 3):
        with serving_on(fake_devices(count)) as (listener, _):
            worker = WorkerConfig(listener.address, patience_s=0)
            with LLM("synthetic:tiny", protection=protection, worker=worker, compute=compute) as llm:
                assert llm.session is not None
                assert llm.session.welcome.device == ",".join(f"cuda:{n}" for n in range(count))
                found.append([answer.token_ids for answer in llm.generate([[5, 17, 250, 3], [1]], params)])
    assert found[0] == found[1]


def test_partition_layer_is_refused_at_the_handshake() -> None:
    with serving_on(fake_devices(2)) as (listener, _):
        worker, compute = (
            WorkerConfig(listener.address, patience_s=0),
            ComputeConfig(partition="layer", dtype="float32"),
        )
        with pytest.raises(ModelMismatch, match="computes on cuda:0,cuda:1, and partition layer is of a worker on one"):
            LLM("synthetic:tiny", protection="open", worker=worker, compute=compute).close()


def test_partition_layer_is_refused_whatever_the_client() -> None:
    devices = fake_devices(2)
    worker = Worker(owned_store(devices, "float"))
    with served(worker, devices, HELLO):
        reply = answer(worker, Begin(1, (Place(1, 0, 2, 0),), 8, ()), torch.zeros(2, dtype=torch.int32))
    assert isinstance(reply, Failed)
    assert reply.reason == "this worker computes on cuda:0,cuda:1: partition layer is of a worker on one device"


@pytest.mark.parametrize(
    ("path", "call", "why"),
    [
        ("float", Linear(1, "qkv", 9, None, 1), "there is no group qkv in layer 9"),
        ("float", Linear(1, "qkv", 0, 3, 1), "group qkv has no part 3"),
        ("float", Product(1, "qkv", 0, 1, 4), "products mod p are of the field path"),
        ("field", Linear(1, "qkv", 0, None, 1), "this connection is of the field path"),
        ("field", MultiplyPads(1, "qkv", 0, 2), "a payload of 4 bytes where 64 were expected"),
        ("field", Product(1, "qkv", 0, 1, 4), "a payload of 4 bytes where"),
        ("float", Linear(1, "lm_head", None, None, 2**24), "the limit is"),
    ],
)
def test_calls_that_do_not_fit_are_refused(path: NumericPath, call: Call, why: str) -> None:
    devices = fake_devices(2)
    worker = Worker(owned_store(devices, path))
    with served(worker, devices, Hello(PROTOCOL_VERSION, HELLO.fingerprint, "float32", path)):
        reply = answer(worker, call, torch.zeros(1))
    assert isinstance(reply, Failed)
    assert why in reply.reason


def test_more_devices_than_features_are_refused() -> None:
    check_features(CONFIG, CONFIG.hidden_size)
    with pytest.raises(OptionError, match=r"^\d+ devices cannot share group o of this model, which has \d+ output"):
        check_features(CONFIG, CONFIG.hidden_size + 1)


def test_a_worker_on_several_devices_divides_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsqp.untrusted.store.many_devices", lambda devices: fake_devices(len(devices)))
    cuda = [torch.device("cuda", n) for n in range(3)]
    many = store_on(CHECKPOINT, "float32", cuda)
    assert isinstance(many, ManyStore)
    assert many.backend.name == "cuda:0,cuda:1,cuda:2"
    assert isinstance(store_on(CHECKPOINT, "float32", [torch.device("cpu")]), WeightStore)
    parts = [part for part in many.prepare("float").parts if isinstance(part, ModelWeights)]
    assert len(parts) == 3
    assert sum(part.groups["lm_head", None].group.out_features for part in parts) == CONFIG.vocab_size


def test_the_client_sees_one_group() -> None:
    devices = fake_devices(3)
    many, one = Worker(owned_store(devices, "field")), Worker(STORE)
    hello = Hello(PROTOCOL_VERSION, HELLO.fingerprint, "float32", "field")
    found, expected = greet(many, hello), greet(one, hello)
    assert isinstance(found, Welcome)
    assert isinstance(expected, Welcome)
    assert found.groups == expected.groups
    assert (found.device, found.dtype) == ("cuda:0,cuda:1,cuda:2", expected.dtype)


def test_memory_of_another_device_is_an_error_of_the_fake() -> None:
    host = FakeHost()
    one, other = FakeDriver(host=host), FakeDriver(host=host)
    here, there, locked = one.empty(8, Stream.IN), other.empty(8, Stream.IN), one.locked(8)
    with one.serving(), other.serving():
        other.copy(there, locked, Stream.COMPUTE)  # locked for both
        made = here + 1
        with pytest.raises(ProtocolViolation, match="several devices"):
            torch.add(made[2:4], there[2:4])
        with pytest.raises(ProtocolViolation, match="another device"):
            other.copy(here, locked, Stream.COMPUTE)
    with pytest.raises(ProtocolViolation, match="outside of serving"):
        other.copy(there, locked, Stream.COMPUTE)
