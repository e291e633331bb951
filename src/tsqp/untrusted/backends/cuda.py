"""A CUDA device: payloads are copied in, products out, on streams of their own beside the one that computes.

The order of work is said by events, and the host waits once for each call, when the call ends or later. Products of few
rows that come again are graphs, with their copies on the same stream: there is nothing that those could overlap with,
and an event between two streams would only cost time.

Over ``cuda`` payloads and products are device memory already: what is computed reads and writes it where it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch

from tsqp.arith.field import FieldWeights
from tsqp.arith.product import DigitKernel
from tsqp.arith.tensor_cores import DeviceFieldWeights
from tsqp.untrusted.backends.base import NOTHING_QUEUED, Bind, Finish, Key, Place, Queued, Run, Stages
from tsqp.untrusted.backends.driver import Driver, Event, Graph, Stream
from tsqp.untrusted.backends.graphs import Graphs
from tsqp.untrusted.backends.host_memory import Arenas, Buffers
from tsqp.wire.device_memory import DeviceMemory, Payload
from tsqp.wire.payload import WireFormat, bytes_tensor, check_size, tensor_bytes

STAGED_BYTES = 256 << 20  # of payloads in buffers, before a call waits for the first of them to be copied


# Device memory that stays, a payload, and copies between the two; None for memory that is not locked.
_Pair = tuple[torch.Tensor, torch.Tensor]
_Bound = tuple[torch.Tensor, Payload, Sequence[_Pair] | None]


class CudaBackend:
    """See Backend."""

    compiled_calls = False
    captures = True
    depth = 3  # one is copied in, one computed, one copied out
    compiles_one_row = True

    def __init__(self, driver: Driver, *, arenas: Arenas | None = None) -> None:
        self.device = driver.device
        self._driver = driver
        self._arenas = arenas or Arenas(driver)
        self._graphs = Graphs(driver)
        self._sources, self._targets = Buffers(driver), Buffers(driver)
        self._unsent: list[Finish] = []  # moves of products from buffers to where they are to lie
        self._last: Event | None = None  # after it, all copies that the current call has queued are done
        self._in_place = False  # the current call computes in memory of the client
        self._marks: dict[Stream, list[Event]] = {}  # of the current call: where its work on a stream begins and ends

    @property
    def failed(self) -> str:
        return str(self.device)

    def serving(self) -> AbstractContextManager[None]:
        return self._driver.serving()

    def attach(self, peer: bytes, memory: memoryview) -> None:
        self._arenas.attach(peer, memory)

    def detach(self, peer: bytes) -> None:
        self.drain()
        self._arenas.detach(peer)

    def drain(self) -> None:
        """Wait for all that was computed here, also for what no answer waits for."""
        self.settle()
        self.works()  # once it has answered, no graph is under way; nor is one on a device that has failed

    def field_weights(self, wq: torch.Tensor, kernel: DigitKernel) -> FieldWeights:
        return DeviceFieldWeights.of(wq.to(self.device), kernel)

    def host_copy(self, payload: Payload) -> memoryview:
        if not isinstance(payload, DeviceMemory):
            return payload
        copy = bytearray(payload.nbytes)
        if copy:
            buffer = self._targets.take(len(copy))
            self._driver.copy(buffer, self._alias(payload), Stream.COMPUTE)
            self._driver.synchronise(self._driver.record(Stream.COMPUTE))
            copy[:] = tensor_bytes(buffer)
        return memoryview(copy)

    def stage_in(self, payload: Payload, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        if not (size := check_size(payload, dtype, shape)):
            return torch.empty(shape, dtype=dtype, device=self.device)
        if isinstance(payload, DeviceMemory):
            return self._alias(payload).view(dtype).view(shape)
        source = self._source(payload)
        raw = self._driver.empty(size, Stream.IN)
        self._driver.uses(raw, Stream.COMPUTE)
        begin = self._driver.record(Stream.IN, timed=True)
        self._copy(raw, source, Stream.IN, inwards=True)
        self._last = self._driver.record(Stream.IN, timed=True)
        self._marks[Stream.IN] = [self._marks.get(Stream.IN, [begin])[0], self._last]
        self._driver.wait_on(Stream.COMPUTE, self._last)
        self._marks.setdefault(Stream.COMPUTE, []).append(self._driver.record(Stream.COMPUTE, timed=True))
        return raw.view(dtype).view(shape)

    def floats_in(self, payload: Payload, wire: WireFormat, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if wire.dtype is None:
            return wire.unpack(self.stage_in(payload, torch.uint8, (wire.size(shape),)), shape, dtype)
        return wire.unpack(self.stage_in(payload, wire.dtype, shape), shape, dtype)

    def place(self, out: Payload | None, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor | None:
        if out is not None and check_size(out, dtype, shape) and isinstance(out, DeviceMemory):
            return self._alias(out).view(dtype).view(shape)
        return None

    def stage_out(self, product: torch.Tensor, out: Payload | None) -> Payload:
        raw = product.contiguous().view(-1).view(torch.uint8)
        if isinstance(out, DeviceMemory):
            if check_size(out, torch.uint8, tuple(raw.shape)) and raw.data_ptr() != (y := self._alias(out)).data_ptr():
                y.copy_(raw)
            return out
        if out is None:
            out = tensor_bytes(torch.empty(len(raw), dtype=torch.uint8))
        if check_size(out, torch.uint8, tuple(raw.shape)):
            self._driver.uses(raw, Stream.OUT)
            computed = self._driver.record(Stream.COMPUTE, timed=True)
            self._marks.setdefault(Stream.COMPUTE, []).append(computed)
            self._driver.wait_on(Stream.OUT, computed)
            begin = self._driver.record(Stream.OUT, timed=True)
            self._copy(raw, self._target(out), Stream.OUT, inwards=False)
            self._last = self._driver.record(Stream.OUT, timed=True)
            self._marks[Stream.OUT] = [begin, self._last]
        return out

    def floats_out(self, product: torch.Tensor, wire: WireFormat, out: Payload | None) -> Payload:
        return self.stage_out(wire.pack(product), out)

    def prepare(self, key: Key, x: Place, y: Place, bind: Bind) -> Run | None:
        rows = x.shape[0]
        if not (check_size(*x) and check_size(*y)):
            return None
        captured = self._graphs.of(key, rows, (x.dtype, x.shape[1]), (y.dtype, y.shape[1]), bind)
        if captured is None:
            return None
        own_x, own_y = captured.x[: x.memory.nbytes], captured.y[: y.memory.nbytes]
        sources, targets = self._pieces(x.memory), self._pieces(y.memory)
        # Bound once, since a call has little time for Python.
        inwards = None if sources is None else _pairs(own_x, sources)
        outwards = None if targets is None else _pairs(own_y, targets)
        return partial(self._again, captured.graph, (own_x, x.memory, inwards), (own_y, y.memory, outwards))

    def stage_into(self, payload: memoryview, memory: torch.Tensor) -> None:
        check_size(payload, memory.dtype, tuple(memory.shape))
        raw = memory.view(-1).view(torch.uint8)
        self._copy(raw, self._source(payload), Stream.COMPUTE, inwards=True)
        self._last = self._driver.record(Stream.COMPUTE)

    def captured(self, work: Run) -> Run:
        graph = self._graphs.capture(work)
        return work if graph is None else graph.replay

    def submit(self) -> Queued:
        last, self._last = self._last, None
        unsent, self._unsent = self._unsent, []
        in_place, self._in_place = self._in_place, False
        marks, self._marks = self._marks, {}
        events = [self._driver.record(Stream.COMPUTE)] if in_place else []
        events += [] if last is None else [last]
        if not events:
            return NOTHING_QUEUED
        stages = [marks.get(stream, ()) for stream in Stream]
        known = all(len(stage) == 2 for stage in stages)  # not of what was computed from two payloads, or in place
        return CopiesQueued(self._driver, events, unsent, (self._sources, self._targets), stages if known else ())

    def settle(self) -> None:
        self.submit().wait()

    def is_out_of_memory(self, error: BaseException) -> bool:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        text = str(error)  # libraries and locked memory have no class of their own for it
        return isinstance(error, RuntimeError) and ("out of memory" in text or "ALLOC_FAILED" in text)

    def works(self) -> bool:
        try:
            self._driver.synchronise(self._driver.record(Stream.COMPUTE))
        except RuntimeError:  # the error of before: CUDA raises one that it keeps at every call
            return False
        return True

    def trim(self) -> None:
        self._driver.trim()

    def close(self) -> None:
        self.settle()
        self._arenas.close()

    def _again(self, graph: Graph, x: _Bound, y: _Bound) -> None:
        """Copy in, multiply, copy out, in this order on one stream."""
        own_x, source, inwards = x
        for part, piece in inwards or _pairs(own_x, self._source(source)):
            self._driver.copy(part, piece, Stream.COMPUTE)
        graph.replay()
        own_y, target, outwards = y
        for part, piece in outwards or _pairs(own_y, self._target(target)):
            self._driver.copy(piece, part, Stream.COMPUTE)
        self._last = self._driver.record(Stream.COMPUTE)

    def _copy(self, device: torch.Tensor, host: Sequence[torch.Tensor], stream: Stream, *, inwards: bool) -> None:
        for part, piece in _pairs(device, host):
            if inwards:
                self._driver.copy(part, piece, stream)
            else:
                self._driver.copy(piece, part, stream)

    def _alias(self, memory: DeviceMemory) -> torch.Tensor:
        """Memory of the client on this device, uint8 (n,); the current call is waited for on its account."""
        self._in_place = True
        return self._driver.alias(memory)

    def _pieces(self, memory: Payload) -> Sequence[torch.Tensor] | None:
        """What a copy can take as it is; None for memory of the host that is not locked."""
        return [self._alias(memory)] if isinstance(memory, DeviceMemory) else self._arenas.pieces(memory)

    def _source(self, payload: Payload) -> Sequence[torch.Tensor]:
        """Memory with the payload's bytes that a copy can take: where it lies, or a buffer that gets a copy now."""
        pieces = self._pieces(payload)
        if pieces is not None or isinstance(payload, DeviceMemory):
            return pieces or []
        if self._last is not None and self._sources.taken_bytes + payload.nbytes > STAGED_BYTES:
            self._driver.synchronise(self._last)
            self._sources.release()
        buffer = self._sources.take(payload.nbytes)
        buffer.copy_(bytes_tensor(payload, torch.uint8, (payload.nbytes,)))
        return [buffer]

    def _target(self, out: Payload) -> Sequence[torch.Tensor]:
        """Memory for a product that a copy can take: its place, or a buffer from which it is moved as the call ends."""
        pieces = self._pieces(out)
        if pieces is not None or isinstance(out, DeviceMemory):
            return pieces or []
        buffer = self._targets.take(out.nbytes)
        self._unsent.append(partial(_moved, buffer, out))
        return [buffer]


class CopiesQueued:
    """See Queued: the work of one call, up to some events; what the host does after them; buffers of both."""

    def __init__(
        self,
        driver: Driver,
        events: Sequence[Event],
        unsent: Sequence[Finish],
        buffers: Sequence[Buffers],
        stages: Sequence[Sequence[Event]] = (),
    ) -> None:
        self._driver, self._events, self._unsent, self._stages = driver, events, unsent, stages
        self._taken = [(own, own.hand_over()) for own in buffers]

    def done(self) -> bool:
        try:
            return all(self._driver.done(event) for event in self._events)
        except RuntimeError:
            return True  # ``wait`` says what has failed

    def wait(self) -> None:
        for event in self._events:
            self._driver.synchronise(event)
        for move in self._unsent:
            move()
        for own, taken in self._taken:
            own.put_back(taken)

    def stages(self) -> Stages | None:
        if not self._stages:
            return None
        first = self._stages[0][0]
        inwards, computing, outwards = (
            (self._after(first, begin), self._after(first, end)) for begin, end in self._stages
        )
        return inwards, computing, outwards

    def _after(self, first: Event, event: Event) -> int:
        return max(0, self._driver.elapsed_ns(first, event))


def _pairs(device: torch.Tensor, host: Sequence[torch.Tensor]) -> list[_Pair]:
    """Device memory, cut as the host's pieces of the same bytes are, with each piece."""
    return list(zip(device.split([len(piece) for piece in host]), host, strict=True))


def _moved(buffer: torch.Tensor, out: memoryview) -> None:
    out[:] = tensor_bytes(buffer)
