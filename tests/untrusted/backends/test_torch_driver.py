"""The driver's calls by torch, as far as they can be looked at without a GPU: what the CUDA runtime is told."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from tsqp.untrusted.backends import torch_driver
from tsqp.untrusted.backends.driver import Stream
from tsqp.untrusted.backends.torch_driver import TorchDriver


class Runtime:
    """``cudaMemcpy2DAsync`` as the CUDA runtime's reference has it, at once and on the host."""

    def __init__(self, result: int = 0) -> None:
        self.result = result
        self.asked: list[tuple[int, int]] = []  # kind and stream

    def cudaMemcpy2DAsync(  # noqa: N802
        self, dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: int, stream: int
    ) -> int:
        self.asked.append((kind, stream))
        for row in range(0 if self.result else height):
            ctypes.memmove(dst + row * dpitch, src + row * spitch, width)
        return self.result


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> TorchDriver:
    """One whose device is this host."""
    made = object.__new__(TorchDriver)
    made.device = torch.device("cpu")
    made._streams = {stream: SimpleNamespace(cuda_stream=7 + n) for n, stream in enumerate(Stream)}  # type: ignore[misc]
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    return made


def test_rows_go_to_where_they_lie_apart(driver: TorchDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    monkeypatch.setattr(torch_driver, "cuda_runtime", lambda: runtime)
    whole = torch.zeros(5, 40, dtype=torch.uint8)
    product = torch.randint(1, 256, (4, 12), dtype=torch.uint8)
    driver.copy_rows(whole[:4, 8:18], product[:, :10], Stream.OUT)
    expected = torch.zeros(5, 40, dtype=torch.uint8)
    expected[:4, 8:18] = product[:, :10]
    assert torch.equal(whole, expected)
    assert runtime.asked == [(2, 7 + list(Stream).index(Stream.OUT))]  # device to host, in its stream


def test_what_the_runtime_refuses_is_an_error(driver: TorchDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_driver, "cuda_runtime", lambda: Runtime(result=700))
    with pytest.raises(RuntimeError, match="CUDA error 700 from cudaMemcpy2DAsync"):
        driver.copy_rows(torch.zeros(2, 8, dtype=torch.uint8)[:, :4], torch.zeros(2, 4, dtype=torch.uint8), Stream.OUT)


def test_sizes_of_the_runtimes_call_have_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them, ctypes would cut addresses to 32 bits."""
    library = SimpleNamespace(cudaMemcpy2DAsync=SimpleNamespace())
    asked = list[str]()

    def load(name: str) -> SimpleNamespace:
        asked.append(name)
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    torch_driver.cuda_runtime.cache_clear()
    try:
        torch_driver.cuda_runtime()
    finally:
        torch_driver.cuda_runtime.cache_clear()
    assert asked == ["libcudart.so.13"]
    assert [ctypes.sizeof(kind) for kind in library.cudaMemcpy2DAsync.argtypes] == [8, 8, 8, 8, 8, 8, 4, 8]


POOL = torch.cuda._POOL_HANDLE((0, 1))


class Graph:
    """As ``torch.cuda.CUDAGraph``; ``refused``: CUDA does not end the capture."""

    refused = False

    def __init__(self) -> None:
        self.said: list[str] = []
        self.ended: list[object] = []  # whose capture torch's allocator was told to end

    def capture_begin(self, **options: object) -> None:
        self.said.append("begin")

    def capture_end(self) -> None:
        self.said.append("end")
        if self.refused:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.fixture
def graph(driver: TorchDriver, monkeypatch: pytest.MonkeyPatch) -> Graph:
    """What the driver captures into, on device 3; where it has torch's allocator end a capture, that is said too."""
    graph = Graph()
    driver.device = torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    end = lambda *place: graph.ended.append(place)  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    return graph


@pytest.mark.parametrize("refused", [True, False])
def test_a_capture_that_fails_is_over_and_says_why(refused: bool, driver: TorchDriver, graph: Graph) -> None:
    """Otherwise the allocator would hold for ever what two streams have used; seen on a GPU by others only."""
    calls = list[None]()
    graph.refused = refused

    def work() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        driver.capture(work, POOL)
    assert graph.said == ["begin", "end"]
    assert graph.ended == ([(3, (0, 1))] if refused else [])


def test_a_capture_that_cuda_does_not_end_is_over_too(driver: TorchDriver, graph: Graph) -> None:
    graph.refused = True
    with pytest.raises(RuntimeError, match="previous error"):
        driver.capture(lambda: None, POOL)
    assert graph.ended == [(3, (0, 1))]


def test_memory_that_cannot_be_given_back_ends_no_worker(driver: TorchDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    driver.trim()


def test_the_stream_that_serves_is_entered_once(driver: TorchDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode step has three calls there for each product, and entering a stream takes some microseconds of Python."""
    entered = list[object]()

    def stream(one: object) -> nullcontext[None]:
        entered.append(one)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    compute, inwards = (driver._streams[one] for one in (Stream.COMPUTE, Stream.IN))
    monkeypatch.setattr(compute, "wait_stream", lambda _: None, raising=False)
    memory, replayed = torch.zeros(2, dtype=torch.uint8), list[None]()
    graph = torch_driver._ComputeGraph(SimpleNamespace(replay=lambda: replayed.append(None)), driver)  # type: ignore[arg-type]
    with driver.serving():
        driver.copy(memory, memory, Stream.COMPUTE)
        graph.replay()
        driver.copy(memory, memory, Stream.IN)
        driver.copy(memory, memory, Stream.COMPUTE)
        assert entered == [compute, inwards]
    driver.copy(memory, memory, Stream.COMPUTE)
    graph.replay()
    assert entered == [compute, inwards, compute, compute]
    assert len(replayed) == 2
