"""A driver that computes on the CPU and keeps to what a GPU may do at worst: every copy is done as late as is allowed.

What was queued and not waited for has not happened: whoever reads it too early finds bytes that nobody wrote. What a
GPU would do only with luck raises ``ProtocolViolation``.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.wire.fake_cuda import FakeIpc
from tsqp.untrusted.backends.driver import Stream
from tsqp.wire.device_memory import DeviceMemory

NOT_COPIED_IN, NOT_COPIED_OUT = 0xA5, 0x5A
WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero"}  # operators that wait for the device

INDEXED = {"index", "index_put", "index_put_"}  # they wait where an index is a mask


class ProtocolViolation(BaseException):
    """Something that goes wrong on a GPU, some of the time or always. No worker answers it as a fault of a call."""


@dataclass(frozen=True)
class FakeEvent:
    stream: Stream
    position: int
    copies: int  # how many copies had been queued, on all streams
    at: int | None = field(default=None, compare=False)  # when it was asked for, if it is timed


class FakePool:
    """As torch's allocator keeps one: it ends with the last graph that has it, and cannot be begun again."""

    def __init__(self) -> None:
        self._graphs, self._ended = 0, False

    def take(self, graph: FakeGraph) -> None:
        """One more graph has it."""
        if self._ended:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED\nand so on")
        self._graphs += 1
        weakref.finalize(graph, self._let_go)

    def _let_go(self) -> None:
        self._graphs -= 1
        self._ended = not self._graphs


@dataclass(frozen=True, eq=False)
class FakeGraph:
    driver: FakeDriver
    work: Callable[[], object]

    def replay(self) -> None:
        self.driver.compute(self.work)


class FakeHost:
    """What devices of one host share: locked memory is locked for all of them. And which memory is whose.

    An operator on memory of two devices, or a copy by another device, is a ``ProtocolViolation``. Memory has an owner
    from ``FakeDriver.empty`` and ``owns``, and what operators make of it has the same. Loops on NumPy arrays are not
    seen.
    """

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}  # sizes by address
        self.own: dict[int, torch.Tensor] = {}
        self.drivers: list[FakeDriver] = []
        self._owners: weakref.WeakKeyDictionary[torch.UntypedStorage, FakeDriver] = weakref.WeakKeyDictionary()
        self._serving = 0

    @property
    def is_serving(self) -> bool:
        """Whether torch's operators go to COMPUTE."""
        return self._serving > 0

    def owner(self, memory: torch.Tensor) -> FakeDriver | None:
        """The device that this memory is on; None for the host's, and for what is not known."""
        return self._owners.get(memory.untyped_storage())

    def give(self, memory: torch.Tensor, driver: FakeDriver) -> None:
        """Memory is this device's from here on."""
        self._owners[memory.untyped_storage()] = driver

    def owner_of(self, tensors: Iterable[Any]) -> FakeDriver | None:
        """The one device whose memory these are."""
        found = {id(owner): owner for one in tensors if isinstance(one, torch.Tensor) and (owner := self.owner(one))}
        if len(found) > 1:
            raise ProtocolViolation("an operator on memory of several devices")
        return next(iter(found.values()), None)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Torch's operators are watched, once for all devices."""
        self._serving += 1
        try:
            with _Operators(self) if self._serving == 1 else nullcontext():
                yield
        finally:
            self._serving -= 1


class FakeDriver:
    """See Driver. ``refusal`` is why no memory can be locked; ``room`` is how much one allocation may have.

    Drivers of one ``host`` are devices of it. ``ipc``: whose memory can be aliased. What is written to an alias gets
    there when the call is waited for.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        *,
        refusal: str | None = None,
        graphs: bool = True,
        room: int = 1 << 40,
        host: FakeHost | None = None,
        ipc: FakeIpc | None = None,
    ) -> None:
        self.refusal, self.graphs, self.room = refusal, graphs, room
        self.host = host or FakeHost()
        self.host.drivers.append(self)
        self.registered = self.host.registered
        self.strips = 0  # copies of rows that lie apart
        self.failure: Exception | None = None  # of what it is asked to wait for
        self.most_registered = self.synchronised = self.captured = self.replayed = self.trimmed = self.copies = 0
        self.recorded = 0
        self._own = self.host.own
        self._queued = dict.fromkeys(Stream, 0)
        self._done = dict.fromkeys(Stream, 0)
        self._queues: dict[Stream, deque[Callable[[], None]]] = {stream: deque() for stream in Stream}
        self._out_knows = 0  # the position of COMPUTE that OUT waits for
        self._declared: dict[Stream, set[int]] = {stream: set() for stream in Stream}  # addresses, by ``uses``
        self._capturing = False
        self._own_work = self.copying = False
        self._in_use: list[tuple[int, int, int]] = []  # which copy, and where its buffer begins and ends
        self._asked: set[FakeEvent] = set()
        self.late: Callable[[], bool] = lambda: False
        self._ipc = ipc
        self._aliases: dict[DeviceMemory, torch.Tensor] = {}
        self.touched: set[DeviceMemory] = set()  # memory of clients, since the last wait for what computes
        self._in_a_call = False  # since its first copy, until its answer is waited for

    # What the tests ask for.

    def owns(self, memory: torch.Tensor) -> torch.Tensor:
        """Memory is on this device from here on."""
        self.host.give(memory, self)
        return memory

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
        with self.host.serving():
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
        if not all(driver.idle for driver in self.host.drivers):
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
        with self._by_itself():
            memory = torch.full((size,), NOT_COPIED_IN, dtype=torch.uint8)
        self.host.give(memory, self)
        return memory

    def alias(self, memory: DeviceMemory) -> torch.Tensor:
        self._not_while_capturing()
        with self._by_itself():
            if memory not in self._aliases:
                self._aliases[memory] = torch.empty(memory.nbytes, dtype=torch.uint8)
            if memory not in self.touched:
                self._aliases[memory].copy_(self._outside(memory))
        self.touched.add(memory)
        return self._aliases[memory]

    def uses(self, memory: torch.Tensor, stream: Stream) -> None:
        self._declared[stream].add(memory.data_ptr())

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        self._not_while_capturing()
        if not self.host.is_serving:
            raise ProtocolViolation("a copy outside of serving(): what computes is on no stream that waits for it")
        self.copies += 1
        if target.nbytes != source.nbytes or {target.dtype, source.dtype} != {torch.uint8}:
            raise ProtocolViolation("a copy of other bytes")
        aliases = [self._alias_of(source), self._alias_of(target)]
        if any(aliases):
            return self._copy_alias(target, source, aliases, stream)
        device = source if self._is_locked(target) else target
        if len(self.host.drivers) > 1 and self.host.owner(device) is not self:
            raise ProtocolViolation("a copy of memory that another device has, or none")
        inwards = self._is_locked(source)
        if inwards == self._is_locked(target):
            raise ProtocolViolation("a copy between memory of which not just one is locked, in one piece")
        if stream is Stream.OUT and self._out_knows < self._queued[Stream.COMPUTE]:
            raise ProtocolViolation("a product is copied out before OUT waits for what computes it")
        if (stream is Stream.OUT) == inwards and stream is not Stream.COMPUTE:
            raise ProtocolViolation("a copy on the stream of the other direction")
        self._check_declared(target if inwards else source, stream)
        with self._moving():
            target.fill_(NOT_COPIED_IN if inwards else NOT_COPIED_OUT)

        def work() -> None:
            if not self._is_locked(source if inwards else target):
                raise ProtocolViolation("a copy in memory that is unregistered by now")
            with self._moving():
                target.copy_(source)

        self._queue(stream, work)
        self._use_buffer(source if inwards else target)
        self._in_a_call = True
        return None

    def copy_rows(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        if target.shape != source.shape or target.stride(1) != 1 or len({target.stride(0), target.shape[1]}) == 1:
            raise ProtocolViolation("a copy of rows is for such as lie apart")
        self.strips += 1
        self.copy(target, source, stream)

    def record(self, stream: Stream, *, timed: bool = False) -> FakeEvent:
        self._not_while_capturing()
        self.recorded += 1
        return FakeEvent(stream, self._queued[stream], self.copies, self.recorded if timed else None)

    def elapsed_ns(self, begin: Any, end: Any) -> int:
        """A thousand for each event that was recorded meanwhile."""
        if any(self._done[event.stream] < event.position for event in (begin, end)):
            raise ProtocolViolation("a time is asked for that has not come")
        if None in (begin.at, end.at):
            raise ProtocolViolation("an event that has no time")
        return 1000 * (end.at - begin.at)

    def wait_on(self, stream: Stream, event: Any) -> None:
        self._not_while_capturing()
        if stream is Stream.OUT and event.stream is Stream.COMPUTE:
            self._out_knows = max(self._out_knows, event.position)
        self._queue(stream, lambda: self._do(event.stream, event.position))
        if stream is Stream.COMPUTE:
            self._drain(stream)  # torch's operators, which come next, compute at once

    def done(self, event: Any) -> bool:
        """Once what ``late`` says is over; never at once."""
        self._not_while_capturing()
        if event not in self._asked or self.late():
            self._asked.add(event)
            return False
        self._do(event.stream, event.position)
        return True

    def synchronise(self, event: Any) -> None:
        self._not_while_capturing()
        self.synchronised += 1
        if self.failure is not None:
            failure, self.failure = self.failure, None
            self._drain(event.stream)
            raise failure
        for declared in self._declared.values():
            declared.clear()  # what is free after this may have another use
        self._do(event.stream, event.position)
        self._in_use = [use for use in self._in_use if use[0] > event.copies]
        if event.stream is Stream.COMPUTE and not self._queues[Stream.COMPUTE]:
            with self._by_itself():
                for memory in self.touched:
                    self._outside(memory).copy_(self._aliases[memory])
            self.touched.clear()
        self._in_a_call = False

    def new_pool(self) -> FakePool:
        return FakePool()

    def capture(self, work: Callable[[], object], pool: Any) -> FakeGraph:
        self._not_while_capturing()
        if not self.graphs:
            raise RuntimeError("operation not permitted when stream is capturing\nand so on")
        graph = FakeGraph(self, work)
        pool.take(graph)
        self._drain(Stream.COMPUTE)
        with self._by_itself():
            work()
            self._capturing = True
            work()
        self._capturing = False
        self.captured += 1
        return graph

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
        first = memory.data_ptr()
        end = first + (len(memory) - 1) * memory.stride(0) + memory[0].numel() if memory.numel() else first
        own = {start: buffer.nbytes for start, buffer in self._own.items()}
        return any(start <= first and end <= start + size for start, size in (self.registered | own).items())

    def _use_buffer(self, host: torch.Tensor) -> None:
        """That a locked buffer has one use until the host has waited for it."""
        first, end = host.data_ptr(), host.data_ptr() + host.nbytes
        if any(start <= first and end <= start + own.nbytes for start, own in self._own.items()):
            if any(first < other_end and start < end for _, start, other_end in self._in_use):
                raise ProtocolViolation("a buffer has another use while a copy is under way in it")
            self._in_use.append((self.copies, first, end))

    def _alias_of(self, memory: torch.Tensor) -> DeviceMemory | None:
        return next((one for one, alias in self._aliases.items() if alias.data_ptr() == memory.data_ptr()), None)

    def _outside(self, memory: DeviceMemory) -> torch.Tensor:
        """The client's memory itself."""
        if self._ipc is None or not self._ipc.holds(memory.address, memory.nbytes):
            raise ProtocolViolation("memory that is not, or no more, open on this device")
        return torch.frombuffer((ctypes.c_ubyte * memory.nbytes).from_address(memory.address), dtype=torch.uint8)

    def _copy_alias(
        self, target: torch.Tensor, source: torch.Tensor, aliases: list[DeviceMemory | None], stream: Stream
    ) -> None:
        """Between memory of a client and any other, in the order of what computes."""
        if stream is not Stream.COMPUTE:
            raise ProtocolViolation("a client's memory is used on a stream that nothing orders")
        if aliases[0] is not None:
            self.alias(aliases[0])
        self.touched.update(one for one in aliases if one is not None)

        def work() -> None:
            with self._moving():
                target.copy_(source)

        self._queue(stream, work)
        if self._is_locked(target):
            self._use_buffer(target)
        self._in_a_call = True

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
    def _moving(self) -> Iterator[None]:
        """Bytes cross between host and device: no operator does that."""
        before, self.copying = self.copying, True
        try:
            yield
        finally:
            self.copying = before

    @contextmanager
    def _by_itself(self) -> Iterator[None]:
        before, self._own_work = self._own_work, True
        try:
            yield
        finally:
            self._own_work = before


class _Operators(TorchDispatchMode):
    """Tells a driver of torch's operators, views apart, which compute nothing; what they make is on its device."""

    def __init__(self, host: FakeHost) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._host = host

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drivers = self._host.drivers
        if any(driver.copying for driver in drivers):
            return func(*args, **(kwargs or {}))
        owner = self._host.owner_of(tree_leaves((args, kwargs)))
        driver = owner or (drivers[0] if len(drivers) == 1 else None)
        if driver is not None and not func.is_view:
            name = func.overloadpacket.__name__
            by_mask = name in INDEXED and any(one is not None and one.dtype == torch.bool for one in args[1])
            driver.operator("nonzero" if by_mask else name)
        result = func(*args, **(kwargs or {}))
        if owner is not None:
            for made in tree_leaves(result):
                if isinstance(made, torch.Tensor):
                    self._host.give(made, owner)
        return result
