"""A worker on CUDA, as far as that goes without a GPU: over a driver that lets no copy happen earlier than it must."""

from __future__ import annotations

import logging
import subprocess
import sys
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.arith.kernels import CPU
from tests.untrusted.calls import CHECKPOINT
from tests.untrusted.device_calls import CALLS, HIDDEN, NAMES, QKV, on_the_cpu, payload_of
from tests.untrusted.fake_driver import FakeDriver
from tests.untrusted.shm_worker import CLIENT, connected, failure, fake_backend, product, serving
from tests.wire.links import WAIT_S
from tsqp.config.dtype import NumericPath, WireDtype
from tsqp.model.weights import ModelWeights
from tsqp.untrusted.backends.base import Place, Run
from tsqp.untrusted.backends.cuda import CudaBackend
from tsqp.untrusted.paths.plain import Operators
from tsqp.wire.messages import Call, Linear, MultiplyPads, Product
from tsqp.wire.payload import wire_format
from tsqp.wire.transport import new_ipc_address


@pytest.mark.parametrize(("path", "call"), CALLS, ids=NAMES)
@pytest.mark.parametrize("refusal", [None, "no"])
@pytest.mark.parametrize("transport", ["shm", "ipc"])
def test_answers_are_those_of_the_cpu_to_the_bit(
    path: NumericPath, call: Call, refusal: str | None, transport: str
) -> None:
    """Three times: as it comes first, and twice as a graph where it can be one. Each waits once."""
    driver = FakeDriver(refusal=refusal)
    payload = payload_of(call, dtype=torch.bfloat16 if path == "int8" else torch.float32)
    expected = on_the_cpu(path, call, payload)
    address = new_ipc_address() if transport == "ipc" else None
    with serving(fake_backend(driver), address) as (listener, _), connected(listener, path) as channel:
        answers = product(channel, call, payload, len(expected), times=3)
        assert answers == [expected] * 3
        assert driver.synchronised == 3
        few = isinstance(call, Linear | Product) and call.rows <= 16 and transport == "shm"
        assert (driver.captured, driver.replayed) == ((1, 2) if few else (0, 0))
        assert bool(driver.registered) == (refusal is None and transport == "shm")
    assert driver.registered == {}
    assert driver.idle


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
def test_floats_in_other_formats_are_converted_on_the_device(wire: WireDtype) -> None:
    weights = ModelWeights.load(CHECKPOINT, "float32", CPU)
    driver = FakeDriver()
    backend = fake_backend(driver)
    x = torch.randn(3, HIDDEN)
    payload = memoryview(bytearray(wire_format(wire).size((3, HIDDEN))))
    wire_format(wire).write(x, payload)
    call = Linear(1, "qkv", 0, None, 3)
    expected = Operators(weights, wire_format(wire))(call, [payload])
    assert isinstance(expected, memoryview)
    out = memoryview(bytearray(wire_format(wire).size((3, QKV.out_features))))
    with backend.serving():
        assert Operators(weights, wire_format(wire), backend)(call, [payload], out) is out
        assert bytes(out) != bytes(expected), "nothing is there before it is waited for"
        backend.settle()
    assert bytes(out) == bytes(expected)


def test_rows_are_rounded_up_and_other_rows_stay_on_the_device() -> None:
    driver = FakeDriver()
    with serving(fake_backend(driver)) as (listener, _), connected(listener, "field") as channel:
        for rows in (16, 9, 12, 3, 4):
            call = Product(1, "qkv", 0, rows, 4)
            payload = payload_of(call, rows)
            expected = on_the_cpu("field", call, payload)
            assert product(channel, call, payload, len(expected), times=2) == [expected] * 2
    assert driver.captured == 2  # for 16 rows and for 4


@pytest.mark.parametrize("payloads", [1, 2, 3])
def test_a_call_has_stages_where_all_of_its_input_comes_before_all_of_its_work(payloads: int) -> None:
    """Attention of partition op is computed from several payloads, of which each is computed with as it is there."""
    backend = fake_backend(FakeDriver())
    with backend.serving():
        staged = [backend.stage_in(memoryview(bytes(64)), torch.float32, (16,)) for _ in range(payloads)]
        backend.stage_out(sum(staged[1:], staged[0]), None)
        queued = backend.submit()
        queued.wait()
        assert (queued.stages() is not None) == (payloads == 1)


class Cuts(TorchDispatchMode):
    """Which operators make views of memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += [func.__name__] if func.__name__.startswith(("slice", "split")) else []
        return func(*args, **(kwargs or {}))


def test_a_call_that_comes_again_cuts_no_memory() -> None:
    """Each cut is a microsecond of Python, between two launches that take as long."""
    driver = FakeDriver()
    backend, memory = fake_backend(driver), memoryview(bytearray(256))
    backend.attach(b"client", memory)
    x, y = (Place(memory[first : first + 64], torch.uint8, (4, 16)) for first in (0, 128))
    memory[:64] = bytes([7] * 64)

    def bind(source: torch.Tensor, target: torch.Tensor) -> Run:
        return lambda: torch.add(source, source, out=target)

    with backend.serving():
        again = backend.prepare(
            ("doubled",), x, y, lambda source, target: lambda: torch.add(source, source, out=target)
        )
        assert again is not None
        with Cuts() as cuts:
            again()
        backend.settle()
    assert bytes(memory[128:192]) == bytes([14] * 64)
    assert cuts.seen == []
    backend.detach(b"client")


def test_layers_do_not_share_a_graph() -> None:
    driver = FakeDriver()
    with serving(fake_backend(driver)) as (listener, _), connected(listener) as channel:
        for layer in (0, 1, 0):
            call = Linear(1, "qkv", layer, None, 1)
            expected = on_the_cpu("float", call, payload_of(call))
            assert product(channel, call, payload_of(call), len(expected), times=2) == [expected] * 2
    assert driver.captured == 2


def test_two_connections_have_their_own_memory_and_share_graphs() -> None:
    driver = FakeDriver()
    call = Product(1, "qkv", 0, 1, 4)
    payload = payload_of(call)
    expected = on_the_cpu("field", call, payload)
    with serving(fake_backend(driver)) as (listener, worker):
        with ExitStack() as stack:
            channels = [stack.enter_context(connected(listener, "field")) for _ in range(2)]
            for channel in channels * 2:
                assert product(channel, call, payload, len(expected), times=2) == [expected] * 2
            both = len(driver.registered)
            channels[0].close()
            assert worker.left.acquire(timeout=WAIT_S)
            assert 0 < len(driver.registered) < both
            assert product(channels[1], call, payload, len(expected)) == [expected]
        assert worker.left.acquire(timeout=WAIT_S)
        assert driver.registered == {}
    assert driver.captured == 1
    assert driver.trimmed == 2


def test_a_client_that_is_killed_leaves_nothing_locked() -> None:
    driver = FakeDriver()
    call = Product(1, "qkv", 0, 1, 4)
    expected = on_the_cpu("field", call, payload_of(call))
    with serving(fake_backend(driver)) as (listener, worker):
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


def test_no_more_is_locked_than_is_allowed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="tsqp.worker")
    driver = FakeDriver()
    call = Product(1, "qkv", 0, 100, 4)
    payload = payload_of(call)
    expected = on_the_cpu("field", call, payload)
    with serving(fake_backend(driver, locked_bytes=1 << 15)) as (listener, _), connected(listener, "field") as channel:
        assert product(channel, call, payload, len(expected), times=3) == [expected] * 3
    assert driver.most_registered == 1 << 15
    assert [record.message for record in caplog.records if "not locked" in record.message] == [
        "shared memory is not locked (as much is locked as this worker locks): "
        "copies go through buffers, which is slower"
    ]


def test_a_refusal_is_said_once_and_not_asked_for_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="tsqp.worker")
    driver = FakeDriver(refusal="CUDA error 801")
    call = Product(1, "qkv", 0, 20, 4)
    payload = payload_of(call)
    expected = on_the_cpu("field", call, payload)
    with serving(fake_backend(driver)) as (listener, _), connected(listener, "field") as channel:
        assert product(channel, call, payload, len(expected), times=3) == [expected] * 3
    assert sum("CUDA error 801" in record.message for record in caplog.records) == 1


def test_without_graphs_each_product_is_launched(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="tsqp.worker")
    driver = FakeDriver(graphs=False)
    with serving(fake_backend(driver)) as (listener, _), connected(listener) as channel:
        for layer in (0, 1):
            call = Linear(1, "qkv", layer, None, 1)
            expected = on_the_cpu("float", call, payload_of(call))
            assert product(channel, call, payload_of(call), len(expected), times=2) == [expected] * 2
    assert driver.replayed == 0
    assert sum("CUDA graphs are not used" in record.message for record in caplog.records) == 1


def test_what_did_not_fit_is_named_and_the_worker_goes_on() -> None:
    driver = FakeDriver(room=10_000)
    with serving(fake_backend(driver)) as (listener, _), connected(listener) as channel:
        large = Linear(1, "qkv", 1, None, 100)
        reason = failure(channel, large, payload_of(large), 100 * QKV.out_features * 4)
        assert reason == "cpu is out of memory: there was no room for call linear, group qkv, layer 1, rows 100"
        assert driver.trimmed == 1
        small = Linear(2, "qkv", 1, None, 1)
        expected = on_the_cpu("float", small, payload_of(small))
        assert product(channel, small, payload_of(small), len(expected), times=2) == [expected] * 2


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_lack_of_memory_is_known_by_whatever_says_so(error: Exception) -> None:
    assert CudaBackend(FakeDriver()).is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), ValueError("out of memory")])
def test_other_errors_are_not_lack_of_memory(error: Exception) -> None:
    assert not CudaBackend(FakeDriver()).is_out_of_memory(error)


def test_a_call_that_fails_is_waited_for_as_well() -> None:
    """Its payload may be under way: the client writes there again as soon as it has the answer."""
    driver = FakeDriver()
    with serving(fake_backend(driver)) as (listener, _), connected(listener) as channel:
        call = Linear(1, "qkv", 0, None, 2)
        failure(channel, call, payload_of(call), 12)
        assert driver.idle


def test_payloads_in_buffers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsqp.untrusted.backends.cuda.STAGED_BYTES", 4_000_000)
    driver = FakeDriver()
    call = MultiplyPads(1, "qkv", 0, 80)  # each sixteen of them in a buffer of at least 1 MB
    payload = payload_of(call)
    with serving(fake_backend(driver)) as (listener, _), connected(listener, "field") as channel:
        expected = on_the_cpu("field", call, payload)
        assert product(channel, call, payload, len(expected)) == [expected]
        assert driver.synchronised == 2
