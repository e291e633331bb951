"""The driver's calls by torch. Written without a GPU at hand: ``docs/gpu.md`` says what has run on one."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tsqp.errors import OptionError
from tsqp.untrusted.backends.driver import Event, Graph, Pool, Stream
from tsqp.wire.device_memory import DeviceMemory

_PORTABLE = 1  # cudaHostRegisterPortable: locked for every context of this process
_DEVICE_TO_HOST = 2  # cudaMemcpyDeviceToHost
# Without cuDNN's, which torch would prefer on Hopper: it makes a plan for each number of keys, some 0.4 s of the host.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@cache
def cuda_runtime() -> ctypes.CDLL:
    """The CUDA runtime that torch has loaded, for the copies that torch has no call for. Raises OptionError."""
    name = f"libcudart.so.{(torch.version.cuda or '').partition('.')[0]}"
    try:
        library = ctypes.CDLL(name)
        copy = library.cudaMemcpy2DAsync
    except (OSError, AttributeError) as error:
        raise OptionError(f"several devices in one worker need {name}, and it cannot be used: {error}") from error
    size = ctypes.c_size_t
    copy.argtypes = [ctypes.c_void_p, size, ctypes.c_void_p, size, size, size, ctypes.c_int, ctypes.c_void_p]
    copy.restype = ctypes.c_int
    return library


class TorchDriver:
    """See Driver."""

    _serving = False  # whether COMPUTE is the device's current stream, on the one thread that works with it

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._streams = {stream: torch.cuda.Stream() for stream in Stream}

    @contextmanager
    def serving(self) -> Iterator[None]:
        compute = self._streams[Stream.COMPUTE]
        compute.wait_stream(torch.cuda.current_stream(self.device))  # weights may be on their way on that one
        with torch.cuda.device(self.device), torch.cuda.stream(compute), sdpa_kernel(_ATTENTION):
            self._serving = True
            try:
                yield
            finally:
                self._serving = False

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

    def on(self, stream: Stream) -> AbstractContextManager[object]:
        """Where torch's operators go. Entering a stream that is current already would take as long as a launch."""
        return nullcontext() if self._serving and stream is Stream.COMPUTE else torch.cuda.stream(self._streams[stream])

    def empty(self, size: int, stream: Stream) -> torch.Tensor:
        with self.on(stream):
            return torch.empty(size, dtype=torch.uint8, device=self.device)

    def alias(self, memory: DeviceMemory) -> torch.Tensor:
        return torch.as_tensor(_Foreign(memory), device=self.device)

    def uses(self, memory: torch.Tensor, stream: Stream) -> None:
        memory.record_stream(self._streams[stream])

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        with self.on(stream):
            target.copy_(source, non_blocking=True)

    def copy_rows(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        rows, width = source.shape
        with torch.cuda.device(self.device):
            result = cuda_runtime().cudaMemcpy2DAsync(
                *(target.data_ptr(), target.stride(0), source.data_ptr(), source.stride(0)),
                *(width, rows, _DEVICE_TO_HOST, self._streams[stream].cuda_stream),
            )
        if result:
            raise RuntimeError(f"CUDA error {result} from cudaMemcpy2DAsync")

    def record(self, stream: Stream, *, timed: bool = False) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=timed)
        event.record(self._streams[stream])
        return event

    def elapsed_ns(self, begin: Event, end: Event) -> int:
        return int(begin.elapsed_time(end) * 1e6)  # type: ignore[attr-defined]

    def wait_on(self, stream: Stream, event: Event) -> None:
        self._streams[stream].wait_event(event)  # type: ignore[arg-type]

    def done(self, event: Event) -> bool:
        return bool(event.query())  # type: ignore[attr-defined]

    def synchronise(self, event: Event) -> None:
        event.synchronize()  # type: ignore[attr-defined]

    def new_pool(self) -> Pool:
        return torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], object], pool: Pool) -> Graph:
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph(), which waits for the device, collects garbage and empties the cache for each graph.
        with torch.cuda.device(self.device), torch.cuda.stream(self._streams[Stream.COMPUTE]):
            work()  # libraries set themselves up, and kernels are compiled, which no capture may contain
            try:
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # type: ignore[arg-type]
                work()
                graph.capture_end()
            except BaseException:
                self._abandon(graph, pool)
                raise
        return _ComputeGraph(graph, self)

    def trim(self) -> None:
        with suppress(RuntimeError):  # of a device that has failed, or an allocator that was left in a capture
            torch.cuda.empty_cache()

    def _abandon(self, graph: torch.cuda.CUDAGraph, pool: Pool) -> None:
        """End a capture that has failed.

        Where CUDA refuses its end, torch's allocator would believe for ever that it is under way, and free nothing
        that two streams have used. There is no public call for that.
        """
        with suppress(RuntimeError):
            graph.capture_end()  # if it was not what has failed
            return
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(self.device.index, pool)  # type: ignore[arg-type]


class _Foreign:
    """Device memory as torch takes it from other libraries, without a copy."""

    def __init__(self, memory: DeviceMemory) -> None:
        self.__cuda_array_interface__ = {
            "shape": (memory.nbytes,),
            "typestr": "|u1",
            "data": (memory.address, False),
            "version": 3,
        }


class _ComputeGraph:
    """See Graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph, driver: TorchDriver) -> None:
        self._graph = graph
        self._driver = driver

    def replay(self) -> None:
        with self._driver.on(Stream.COMPUTE):
            self._graph.replay()
