"""CUDA IPC on the GPU: the driver's calls, two processes with one arena, answers over it, and either side killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
import torch

from tsqp import LLM, ComputeConfig, SamplingParams
from tsqp.config.partition import PartitionName
from tsqp.errors import DeviceError, WorkerLost
from tsqp.untrusted.backends.torch_driver import TorchDriver
from tsqp.wire.channel import Frames
from tsqp.wire.codec import encode
from tsqp.wire.device_memory import DeviceMemory
from tsqp.wire.messages import Embed
from tsqp.wire.transport import connect, new_cuda_address
from tsqp.wire.transport.cuda.libcuda import LibCuda
from tsqp.wire.transport.cuda.packets import ALLOCATION_BYTES

MODEL = "synthetic:tiny"
PROMPT = [5, 17, 250, 3, 99, 42, 7, 8, 9, 1, 2, 30, 31, 32, 33, 34, 35, 36, 37]
WAIT_S = 60.0


@contextmanager
def started(*command: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and where it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        try:
            yield process, json.loads(process.stdout.readline())["address"]
        finally:
            process.kill()


@pytest.fixture(scope="module")
def worker() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A worker of the first device, and its address: one for all tests, since a start takes seconds."""
    options = ("--model", MODEL, "--device", "cuda", "--dtype", "float32", "--listen", new_cuda_address())
    with started("tsqp.untrusted", *options) as found:
        yield found


def test_torch_takes_memory_of_the_driver_without_a_copy(device: torch.device) -> None:
    with closing(LibCuda(device.index or 0)) as driver:
        address = driver.mem_alloc(ALLOCATION_BYTES)
        host = torch.arange(1024, dtype=torch.uint8).pin_memory()
        driver.copy_in(address, host.data_ptr(), 1024)
        driver.synchronise()
        alias = TorchDriver(device).alias(DeviceMemory(address, ALLOCATION_BYTES))
        assert alias.data_ptr() == address
        assert torch.equal(alias[:1024].cpu(), host)
        assert not alias[1024:].any(), "the rest are zeros"
        alias[:1024].add_(1)
        torch.cuda.synchronize(device)
        back = torch.zeros_like(host)
        driver.copy_out(back.data_ptr(), address, 1024)
        driver.synchronise()
        assert torch.equal(back, host + 1)
        driver.mem_free(address)


def test_a_process_cannot_open_its_own_handle(device: torch.device) -> None:
    with closing(LibCuda(device.index or 0)) as driver:
        address = driver.mem_alloc(ALLOCATION_BYTES)
        with pytest.raises(DeviceError):
            driver.open_handle(driver.get_handle(address))
        driver.mem_free(address)


def test_bytes_cross_between_two_processes_until_one_is_killed(device: torch.device) -> None:
    with (
        started("tsqp.bench.echo", new_cuda_address()) as (process, address),
        closing(connect(address, arena_bytes=64 << 20)) as channel,
    ):
        for size in (8, 4096, 8 << 20):
            place = channel.reserve(size)
            source = torch.randint(-(2**62), 2**62, (size // 8,))
            torch.frombuffer(place, dtype=torch.int64).copy_(source)
            channel.send(Frames(b"call", (place,)), size)
            (reply,) = channel.receive(WAIT_S).tensors
            assert torch.equal(torch.frombuffer(reply, dtype=torch.int64), ~source)
        process.send_signal(signal.SIGSTOP)
        channel.send(Frames(b"never read"))
        process.kill()
        with pytest.raises(WorkerLost):
            channel.receive(WAIT_S)


@pytest.mark.parametrize("partition", ["linear", "layer"])
def test_answers_are_those_of_one_process(
    partition: PartitionName, worker: tuple[subprocess.Popen[str], str], device: torch.device
) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    compute = ComputeConfig(partition=partition, dtype="float32")
    with LLM(MODEL, protection="open", worker=worker[1], compute=compute) as llm:
        found = llm.generate([PROMPT, PROMPT[:5]], params)
    with LLM(MODEL, protection="local", compute=ComputeConfig(dtype="float32")) as llm:
        expected = llm.generate([PROMPT, PROMPT[:5]], params)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]


CLIENT = """
import sys
from tsqp.wire.channel import Frames
from tsqp.wire.codec import encode
from tsqp.wire.codec import encode
from tsqp.wire.messages import Embed
from tsqp.wire.transport import connect
channel = connect(sys.argv[1])
channel.send(Frames(encode(Embed(1, 1)), (memoryview(bytes(4)),)), 64)
channel.receive(60)
print("answered", flush=True)
sys.stdin.read()
"""


def test_a_worker_outlives_a_killed_client(worker: tuple[subprocess.Popen[str], str], device: torch.device) -> None:
    process, address = worker
    command = [sys.executable, "-c", CLIENT, address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "answered\n"
        client.kill()
    with closing(connect(address)) as channel:
        channel.send(Frames(encode(Embed(1, 1)), (memoryview(bytes(4)),)), 64)
        assert b"no handshake" in channel.receive(WAIT_S).control
    assert process.poll() is None
