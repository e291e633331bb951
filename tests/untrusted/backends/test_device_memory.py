"""A worker whose clients hand over device memory, over fakes of both drivers: computed where it lies, and let go of."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import StartWorker
from tests.families import random_tokens
from tests.untrusted.calls import CHECKPOINT
from tests.untrusted.device_calls import CALLS, HIDDEN, NAMES, QKV, on_the_cpu, payload_of
from tests.untrusted.fake_driver import FakeDriver, FakeEvent
from tests.untrusted.shm_worker import Watched, connected, failure, fake_backend, product, serving
from tests.wire.fake_cuda import FakeIpc
from tests.wire.links import WAIT_S
from tsqp import LLM, ComputeConfig, SamplingParams, WorkerConfig
from tsqp.config.dtype import NumericPath, WireDtype
from tsqp.config.partition import PartitionName
from tsqp.errors import DeviceError, WorkerLost
from tsqp.untrusted.backends.cpu import CpuBackend
from tsqp.untrusted.backends.driver import Stream
from tsqp.wire.channel import Arrival, Departure, Listener
from tsqp.wire.codec import encode
from tsqp.wire.messages import Call, Embed, Linear, MultiplyPads, Product
from tsqp.wire.transport import connect, new_cuda_address
from tsqp.wire.transport.cuda.listener import CudaListener

ROOT = Path(__file__).parents[3]
ARENA_BYTES = 4 << 20


class Here:
    """Both drivers of a worker, and that of its clients."""

    def __init__(self) -> None:
        self.ipc, self.client = FakeIpc(), FakeIpc()
        self.driver = FakeDriver(ipc=self.ipc)
        self.options: dict[str, Any] = {"driver": self.client, "arena_bytes": ARENA_BYTES}

    @contextmanager
    def serving(self) -> Iterator[tuple[Listener, Watched]]:
        """A worker; nothing of a connection is left once it has ended."""
        with serving(fake_backend(self.driver), new_cuda_address(), driver=self.ipc) as served:
            yield served
        assert not self.ipc.opened
        assert not self.client.allocated
        assert not self.client.locked
        assert not self.client.freed_while_open


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    monkeypatch.setattr("tsqp.wire.transport.cuda.channel.PARTING_S", WAIT_S)  # its thread may get no processor
    return Here()


@pytest.mark.parametrize(("path", "call"), CALLS, ids=NAMES)
def test_answers_are_those_of_the_cpu_to_the_bit(path: NumericPath, call: Call, here: Here) -> None:
    """Three times: as it comes first, and twice as a graph where it can be one. Each waits once, or for its indices."""
    payload = payload_of(call, dtype=torch.bfloat16 if path == "int8" else torch.float32)
    expected = on_the_cpu(path, call, payload)
    looked_at = isinstance(call, Embed | MultiplyPads)
    with here.serving() as (listener, _), connected(listener, path, **here.options) as channel:
        assert product(channel, call, payload, len(expected), times=3) == [expected] * 3
        assert here.driver.synchronised == (3 * 3 if looked_at else 3)
    few = isinstance(call, Linear | Product) and call.rows <= 16
    assert (here.driver.captured, here.driver.replayed) == ((1, 2) if few else (0, 0))
    assert here.driver.registered == {}


def test_many_rows_are_multiplied_without_a_copy(here: Here) -> None:
    call = Linear(1, "qkv", 0, None, 100)
    expected = on_the_cpu("float", call, payload_of(call))
    with here.serving() as (listener, _), connected(listener, **here.options) as channel:
        assert product(channel, call, payload_of(call), len(expected), times=2) == [expected] * 2
    assert here.driver.copies == 0


def test_a_prepared_product_reads_what_the_client_has_written_since(here: Here) -> None:
    call = Linear(1, "qkv", 0, None, 1)
    with here.serving() as (listener, _), connected(listener, **here.options) as channel:
        for seed in range(4):
            payload = payload_of(call, seed)
            expected = on_the_cpu("float", call, payload)
            assert product(channel, call, payload, len(expected)) == [expected]
    assert here.driver.captured == 1


@pytest.mark.parametrize(
    ("call", "payload_bytes", "reply_bytes", "reason"),
    [
        (Linear(1, "qkv", 0, None, 2), 8, 8, "a payload of 8 bytes"),
        (Linear(1, "qkv", 0, None, 2), 2 * HIDDEN * 4, 0, "a payload of 0 bytes"),
        (Linear(1, "qkv", 0, None, 2), 2 * HIDDEN * 4, 64, "a payload of 64 bytes"),
        (Embed(1, 2), 8, 64, "a payload of 64 bytes"),
        (Embed(1, 2), 4, 2 * HIDDEN * 4, "a payload of 4 bytes"),
        (Product(1, "qkv", 0, 1, 4), HIDDEN * 4, QKV.out_features * 4, "mod p"),
    ],
)
def test_a_call_that_does_not_fit_is_refused_and_the_next_one_is_answered(
    call: Call, payload_bytes: int, reply_bytes: int, reason: str, here: Here
) -> None:
    good = Linear(2, "qkv", 1, None, 1)
    expected = on_the_cpu("float", good, payload_of(good))
    with here.serving() as (listener, _), connected(listener, **here.options) as channel:
        assert reason in failure(channel, call, bytes(payload_bytes), reply_bytes)
        assert product(channel, good, payload_of(good), len(expected)) == [expected]


def test_token_numbers_are_looked_at_before_the_device_uses_them(here: Here) -> None:
    with here.serving() as (listener, _), connected(listener, **here.options) as channel:
        for bad in (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"):
            assert "vocabulary" in failure(channel, Embed(1, 1), bad, HIDDEN * 4)


def test_a_worker_on_the_cpu_refuses_device_memory_and_lives() -> None:
    ipc, client = FakeIpc(), FakeIpc()
    call = Linear(1, "qkv", 0, None, 1)
    with (
        serving(CpuBackend(), new_cuda_address(), driver=ipc) as (listener, _),
        connected(listener, driver=client, arena_bytes=ARENA_BYTES) as channel,
    ):
        for _ in range(2):
            assert "computes on the CPU" in failure(channel, call, bytes(HIDDEN * 4), QKV.out_features * 4)
        assert "computes on the CPU" in failure(channel, Embed(1, 1), bytes(4), HIDDEN * 4)


def test_two_clients_have_their_own_memory_and_share_graphs(here: Here) -> None:
    call = Linear(1, "qkv", 0, None, 1)
    payloads = [payload_of(call, seed) for seed in range(2)]
    expected = [on_the_cpu("float", call, payload) for payload in payloads]
    with here.serving() as (listener, worker):
        with connected(listener, **here.options) as first:
            with connected(listener, **here.options) as second:
                for _ in range(3):
                    assert product(first, call, payloads[0], len(expected[0])) == [expected[0]]
                    assert product(second, call, payloads[1], len(expected[1])) == [expected[1]]
                assert len(here.ipc.opened) == 2
            assert worker.left.acquire(timeout=WAIT_S)
            assert len(here.ipc.opened) == 1
            assert product(first, call, payloads[0], len(expected[0])) == [expected[0]]
        assert worker.left.acquire(timeout=WAIT_S)
    assert here.driver.captured == 1


def test_memory_is_used_no_more_once_another_message_is_looked_for(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that ends has its memory closed at once: then no call of it may be under way."""
    call, rows = Linear(1, "qkv", 0, None, 100), 100
    expected = on_the_cpu("float", call, payload_of(call))
    under_way, receive = list[bool](), CudaListener.receive

    def received(self: CudaListener, timeout_s: float | None) -> Arrival | Departure | None:
        under_way.append(bool(here.driver.touched))
        return receive(self, timeout_s)

    monkeypatch.setattr(CudaListener, "receive", received)
    here.driver.late = lambda: True  # no call is done before it is waited for
    with here.serving() as (listener, _), connected(listener, **here.options) as channel:
        slots = [channel.slot(rows * HIDDEN * 4, len(expected)) for _ in range(2)]
        for slot in slots:
            slot.tensor[:] = payload_of(call)
            channel.send_from(slot, encode(call))
        assert [bytes(channel.receive(WAIT_S).tensors[0]) for _ in slots] == [expected] * 2
    assert not any(under_way)


def test_a_device_that_has_failed_fails_the_call_and_ends_the_worker(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the end of the work on a client's memory cannot be marked any more."""
    call = Linear(1, "qkv", 0, None, 100)

    def failed(stream: Stream) -> FakeEvent:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def ask() -> None:
        with here.serving() as (listener, _), connected(listener, **here.options) as channel:
            monkeypatch.setattr(here.driver, "record", failed)  # for good, as CUDA keeps such errors
            assert "illegal memory access" in failure(channel, call, payload_of(call), 100 * QKV.out_features * 4)

    with pytest.raises(DeviceError, match="has failed for good"):
        ask()


CLIENT = """
import sys
from tests.wire.fake_cuda import FakeIpc
from tsqp.wire.channel import Frames
from tsqp.wire.codec import encode
from tsqp.wire.messages import PROTOCOL_VERSION, Hello, Linear
from tsqp.wire.transport import connect
address, fingerprint, payload, reply = sys.argv[1:]
channel = connect(address, driver=FakeIpc())
channel.send(Frames(encode(Hello(PROTOCOL_VERSION, fingerprint, "float32", "float"))))
channel.receive(100)
channel.send(Frames(encode(Linear(1, "qkv", 0, None, 1)), (memoryview(bytes.fromhex(payload)),)), int(reply))
print(channel.receive(100).tensors[0].hex(), flush=True)
sys.stdin.read()
"""


def test_a_client_that_is_killed_leaves_no_handle_open(here: Here) -> None:
    call = Linear(1, "qkv", 0, None, 1)
    expected = on_the_cpu("float", call, payload_of(call))
    with here.serving() as (listener, worker):
        arguments = [listener.address, CHECKPOINT.fingerprint(), payload_of(call).hex(), str(len(expected))]
        command = [sys.executable, "-c", CLIENT, *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, cwd=ROOT, **pipes) as client:  # type: ignore[call-overload]
            assert client.stdout.readline().decode().strip() == expected.hex()
            assert len(here.ipc.opened) == 1
            client.kill()
        assert worker.left.acquire(timeout=WAIT_S)
        assert not here.ipc.opened
        with connected(listener, **here.options) as channel:
            assert product(channel, call, payload_of(call), len(expected)) == [expected]


def tokens(address: str, partition: PartitionName, wire: WireDtype, client: FakeIpc | None = None) -> list[list[int]]:
    """Answers of a whole model; ``client`` is the driver of an address of cuda."""
    compute = ComputeConfig(partition=partition, dtype="float32", wire_dtype=wire)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    worker = WorkerConfig(address, patience_s=0)
    prompts = [random_tokens(20), random_tokens(3)]
    to = connect if client is None else partial(connect, driver=client)
    with LLM("synthetic:tiny", protection="open", worker=worker, compute=compute, connect=to) as llm:
        return [list(answer.token_ids) for answer in llm.generate(prompts, params)]


@pytest.mark.parametrize(
    ("partition", "wire"), [("layer", "float32"), ("op", "float32"), ("linear", "float32"), ("linear", "int8")]
)
def test_tokens_are_those_of_a_worker_on_the_cpu(
    partition: PartitionName, wire: WireDtype, here: Here, start_worker: StartWorker
) -> None:
    with here.serving() as (listener, _):
        found = tokens(listener.address, partition, wire, here.client)
    assert here.client.copied > 0
    assert here.driver.idle
    assert found == tokens(start_worker("synthetic:tiny"), partition, wire)


@pytest.mark.slow
def test_a_worker_in_a_process_of_its_own_answers_until_it_is_killed(start_worker: StartWorker) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    compute = ComputeConfig(dtype="float32")
    client, prompt = FakeIpc(), random_tokens(20)
    command = [sys.executable, "-m", "tests.untrusted.cuda_worker_process", "synthetic:tiny", new_cuda_address()]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:  # type: ignore[call-overload]
        worker = WorkerConfig(json.loads(process.stdout.readline())["address"], patience_s=0)
        to = partial(connect, driver=client)
        with LLM("synthetic:tiny", protection="open", worker=worker, compute=compute, connect=to) as llm:
            (found,) = llm.generate([prompt], params)
            process.kill()
            with pytest.raises(WorkerLost, match=r"cuda:///.*: the worker went away"):
                llm.generate([prompt], params)
            assert not client.allocated
            assert not client.locked
    there = start_worker("synthetic:tiny")
    with LLM("synthetic:tiny", protection="open", worker=there, compute=compute) as llm:
        assert [found.token_ids] == [one.token_ids for one in llm.generate([prompt], params)]
