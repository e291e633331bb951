"""A driver that computes on the CPU and keeps to what a GPU may do at worst: every copy is done as late as is allowed.

What was queued and not waited for has not happened: whoever reads it too early finds bytes that nobody wrote. What a
GPU would do only with luck raises ``ProtocolViolation``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tsqp.untrusted.backends.driver import Stream

NOT_COPIED_IN, NOT_COPIED_OUT = 0xA5, 0x5A
WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero"}  # operators that wait for the device


class ProtocolViolation(AssertionError):
    """Something that goes wrong on a GPU, some of the time or always."""


@dataclass(frozen=True)
class FakeEvent:
    stream: Stream
    position: int


@dataclass(frozen=True)
class FakeGraph:
    driver: FakeDriver
    work: Callable[[], object]

    def replay(self) -> None:
        self.driver.compute(self.work)


class FakeDriver:
    """See Driver. ``refusal`` is why no memory can be locked; ``room`` is how much one allocation may have."""

    device = torch.device("cpu")

    def __init__(self, *, refusal: str | None = None, graphs: bool = True, room: int = 1 << 40) -> None:
        self.refusal, self.graphs, self.room = refusal, graphs, room
        self.registered: dict[int, int] = {}  # sizes by address
        self.most_registered = self.synchronised = self.captured = self.replayed = self.trimmed = 0
        self._own: dict[int, torch.Tensor] = {}
        self._queued = dict.fromkeys(Stream, 0)
        self._done = dict.fromkeys(Stream, 0)
        self._queues: dict[Stream, deque[Callable[[], None]]] = {stream: deque() for stream in Stream}
        self._out_knows = 0  # the position of COMPUTE that OUT waits for
        self._declared: dict[Stream, set[int]] = {stream: set() for stream in Stream}  # addresses, by ``uses``
        self._capturing = False
        self._own_work = False
        self._in_a_call = False  # since its first copy, until its answer is waited for

    # What the tests ask for.

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not any(self._queues.values())

    def compute(self, work: Callable[[], object]) -> None:
        """Work of torch's operators, on COMPUTE: at once, after what was queued there."""
        self._not_while_capturing()
        self._drain(Stream.COMPUTE)
        self._advance(Stream.COMPUTE)
        self.replayed += 1
        with self._by_itself():
            work()

    # The driver.

    @contextmanager
    def serving(self) -> Iterator[None]:
        with _Operators(self):
            yield

    def register(self, memory: torch.Tensor) -> str | None:
        self._not_while_capturing()
        if self.refusal is not None:
            return self.refusal
        first, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
        if any(first < start + size and start < end for start, size in self.registered.items()):
            raise ProtocolViolation("memory that is registered is registered again")
        self.registered[first] = memory.nbytes
        self.most_registered = max(self.most_registered, sum(self.registered.values()))
        return None

    def unregister(self, memory: torch.Tensor) -> None:
        if not self.idle:
            raise ProtocolViolation("memory is unregistered while copies are under way")
        if self.registered.pop(memory.data_ptr(), None) != memory.nbytes:
            raise ProtocolViolation("memory is unregistered that was not registered like that")

    def locked(self, size: int) -> torch.Tensor:
        with self._by_itself():
            memory = torch.full((size,), 7, dtype=torch.uint8)
        self._own[memory.data_ptr()] = memory
        return memory

    def empty(self, size: int, stream: Stream) -> torch.Tensor:
        self._not_while_capturing()
        if size > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more\nand so on")
        return torch.full((size,), NOT_COPIED_IN, dtype=torch.uint8)

    def uses(self, memory: torch.Tensor, stream: Stream) -> None:
        self._declared[stream].add(memory.data_ptr())

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        self._not_while_capturing()
        if target.nbytes != source.nbytes or {target.dtype, source.dtype} != {torch.uint8}:
            raise ProtocolViolation("a copy of other bytes")
        inwards = self._is_locked(source)
        if inwards == self._is_locked(target):
            raise ProtocolViolation("a copy between memory of which not just one is locked, in one piece")
        if stream is Stream.OUT and self._out_knows < self._queued[Stream.COMPUTE]:
            raise ProtocolViolation("a product is copied out before OUT waits for what computes it")
        if (stream is Stream.OUT) == inwards and stream is not Stream.COMPUTE:
            raise ProtocolViolation("a copy on the stream of the other direction")
        self._check_declared(target if inwards else source, stream)
        with self._by_itself():
            target.fill_(NOT_COPIED_IN if inwards else NOT_COPIED_OUT)

        def work() -> None:
            if not self._is_locked(source if inwards else target):
                raise ProtocolViolation("a copy in memory that is unregistered by now")
            target.copy_(source)

        self._queue(stream, work)
        self._in_a_call = True

    def record(self, stream: Stream) -> FakeEvent:
        self._not_while_capturing()
        return FakeEvent(stream, self._queued[stream])

    def wait_on(self, stream: Stream, event: Any) -> None:
        self._not_while_capturing()
        if stream is Stream.OUT and event.stream is Stream.COMPUTE:
            self._out_knows = max(self._out_knows, event.position)
        self._queue(stream, lambda: self._do(event.stream, event.position))
        if stream is Stream.COMPUTE:
            self._drain(stream)  # torch's operators, which come next, compute at once

    def synchronise(self, event: Any) -> None:
        self._not_while_capturing()
        self.synchronised += 1
        for declared in self._declared.values():
            declared.clear()  # what is free after this may have another use
        self._do(event.stream, event.position)
        self._in_a_call = False

    def capture(self, work: Callable[[], object]) -> FakeGraph:
        self._not_while_capturing()
        if not self.graphs:
            raise RuntimeError("operation not permitted when stream is capturing\nand so on")
        self._drain(Stream.COMPUTE)
        with self._by_itself():
            work()
            self._capturing = True
            work()
        self._capturing = False
        self.captured += 1
        return FakeGraph(self, work)

    def trim(self) -> None:
        self.trimmed += 1

    # Its insides.

    def operator(self, name: str) -> None:
        """One of torch's operators computes, outside of what this driver does itself."""
        if self._own_work:
            return
        if name in WAITS and self._in_a_call:
            raise ProtocolViolation(f"{name} waits for the device")
        self._drain(Stream.COMPUTE)
        self._advance(Stream.COMPUTE)

    def _is_locked(self, memory: torch.Tensor) -> bool:
        first, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
        own = {start: buffer.nbytes for start, buffer in self._own.items()}
        return any(start <= first and end <= start + size for start, size in (self.registered | own).items())

    def _check_declared(self, device: torch.Tensor, stream: Stream) -> None:
        """That device memory which two streams use is known to be."""
        whole = device.untyped_storage().data_ptr()
        other = {Stream.IN: Stream.COMPUTE, Stream.OUT: Stream.OUT}.get(stream)
        if other is not None and not {whole, device.data_ptr()} & self._declared[other]:
            raise ProtocolViolation("device memory that a second stream uses may be given away too early")

    def _queue(self, stream: Stream, work: Callable[[], None]) -> None:
        self._queued[stream] += 1
        self._queues[stream].append(work)

    def _advance(self, stream: Stream) -> None:
        self._queued[stream] += 1
        self._done[stream] += 1

    def _drain(self, stream: Stream) -> None:
        self._do(stream, self._queued[stream])

    def _do(self, stream: Stream, position: int) -> None:
        with self._by_itself():
            while self._done[stream] < position:
                self._done[stream] += 1
                self._queues[stream].popleft()()

    def _not_while_capturing(self) -> None:
        if self._capturing:
            raise ProtocolViolation("only operators can be captured")

    @contextmanager
    def _by_itself(self) -> Iterator[None]:
        before, self._own_work = self._own_work, True
        try:
            yield
        finally:
            self._own_work = before


class _Operators(TorchDispatchMode):
    """Tells the driver of torch's operators, views apart, which compute nothing."""

    def __init__(self, driver: FakeDriver) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._driver = driver

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self._driver.operator(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
