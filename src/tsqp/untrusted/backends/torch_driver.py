"""The driver's calls by torch. Written without a GPU at hand: ``docs/gpu.md`` says what has run on one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from tsqp.untrusted.backends.driver import Event, Graph, Stream

_PORTABLE = 1  # cudaHostRegisterPortable: locked for every context of this process


class TorchDriver:
    """See Driver."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._streams = {stream: torch.cuda.Stream() for stream in Stream}
            self._pool = torch.cuda.graph_pool_handle()  # graphs never run at the same time, so they share memory

    @contextmanager
    def serving(self) -> Iterator[None]:
        compute = self._streams[Stream.COMPUTE]
        compute.wait_stream(torch.cuda.current_stream(self.device))  # weights may be on their way on that one
        with torch.cuda.device(self.device), torch.cuda.stream(compute):
            yield

    def register(self, memory: torch.Tensor) -> str | None:
        result = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE))
        if result == 0:
            return None
        with suppress(RuntimeError):  # CUDA keeps the error, and the next launch would raise it
            torch.zeros(1, device=self.device)
        return f"CUDA error {result}"

    def unregister(self, memory: torch.Tensor) -> None:
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())

    def locked(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def empty(self, size: int, stream: Stream) -> torch.Tensor:
        with torch.cuda.stream(self._streams[stream]):
            return torch.empty(size, dtype=torch.uint8, device=self.device)

    def uses(self, memory: torch.Tensor, stream: Stream) -> None:
        memory.record_stream(self._streams[stream])

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        with torch.cuda.stream(self._streams[stream]):
            target.copy_(source, non_blocking=True)

    def record(self, stream: Stream) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._streams[stream])
        return event

    def wait_on(self, stream: Stream, event: Event) -> None:
        self._streams[stream].wait_event(event)  # type: ignore[arg-type]

    def synchronise(self, event: Event) -> None:
        event.synchronize()  # type: ignore[attr-defined]

    def capture(self, work: Callable[[], object]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph(), which waits for the device, collects garbage and empties the cache for each graph.
        with torch.cuda.device(self.device), torch.cuda.stream(self._streams[Stream.COMPUTE]):
            work()  # libraries set themselves up, and kernels are compiled, which no capture may contain
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return _ComputeGraph(graph, self._streams[Stream.COMPUTE])

    def trim(self) -> None:
        torch.cuda.empty_cache()


class _ComputeGraph:
    """See Graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
        self._graph = graph
        self._stream = stream

    def replay(self) -> None:
        with torch.cuda.stream(self._stream):
            self._graph.replay()
