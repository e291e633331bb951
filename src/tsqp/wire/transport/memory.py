"""Both ends in one process, joined by queues: for tests, and a model of how a transport behaves."""

from __future__ import annotations

import itertools
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from tsqp.errors import AddressInUse, ProtocolError, WorkerLost, WorkerUnreachable
from tsqp.wire.channel import MAX_FRAME_BYTES, Arrival, Departure, Frames
from tsqp.wire.transport.address import Address
from tsqp.wire.transport.base import BaseChannel, BaseListener, Deadline, check_limits

# SimpleQueue.put may be called from a signal handler; None in a queue means that nothing will follow.
_listeners: dict[str, MemoryListener] = {}
_listeners_lock = threading.Lock()


@dataclass(frozen=True)
class _Connection:
    """What a client holds: the listener that it reached, its name there, and its own inbox."""

    listener: MemoryListener
    peer: bytes
    inbox: SimpleQueue[Frames | None] = field(default_factory=SimpleQueue)


def listen_memory(address: Address, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> MemoryListener:
    """Take a name in this process. Raises AddressInUse."""
    with _listeners_lock:
        if address.target in _listeners:
            raise AddressInUse(f"{address} is in use in this process; close its listener or choose another name")
        listener = _listeners[address.target] = MemoryListener(address, max_frame_bytes)
    return listener


def connect_memory(address: Address, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> MemoryChannel:
    """Connect to a name in this process. Raises WorkerUnreachable."""
    with _listeners_lock:
        listener = _listeners.get(address.target)
    connection = listener.accept() if listener is not None else None
    if connection is None:
        raise WorkerUnreachable(f"{address}: nobody listens there in this process")
    return MemoryChannel(address, max_frame_bytes, connection)


class MemoryChannel(BaseChannel):
    """The trusted side's end."""

    def __init__(self, address: Address, max_frame_bytes: int, connection: _Connection) -> None:
        super().__init__(address, max_frame_bytes)
        self._connection = connection
        self._next: list[Frames | None] = []  # at most one, which ``arrived`` has found

    def _send(self, frames: Frames, reply_bytes: int) -> None:
        if not self._connection.listener.deliver(self._connection, _private_copy(frames)):
            raise self._lost()

    def _arrived_within(self, deadline: Deadline) -> bool:
        if not self._next:
            with suppress(Empty):
                self._next.append(self._connection.inbox.get(timeout=deadline.remaining_s))
        return bool(self._next)

    def _receive(self, deadline_s: float) -> Frames:
        if not self._arrived_within(Deadline(deadline_s)):
            raise self._nothing_came()
        frames = self._next.pop()
        if frames is None:
            raise self._lost()
        check_limits(frames, self._max_frame_bytes)
        return frames

    def _release(self) -> None:
        self._connection.listener.drop(self._connection)

    def _lost(self) -> WorkerLost:
        return WorkerLost("closed the connection", address=self.address)


class MemoryListener(BaseListener):
    """The worker's end."""

    def __init__(self, address: Address, max_frame_bytes: int) -> None:
        super().__init__(address, max_frame_bytes)
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._connections: dict[bytes, _Connection] = {}
        self._inbox: SimpleQueue[Arrival | Departure | None] = SimpleQueue()

    def receive(self, timeout_s: float | None) -> Arrival | Departure | None:
        """See Listener.receive."""
        self._check_open()
        deadline = Deadline(timeout_s)
        while not self._interrupted and not self._closed:
            try:
                event = self._inbox.get(timeout=deadline.remaining_s)
            except Empty:
                if deadline.passed:
                    return None
                continue
            if isinstance(event, Departure) or (event is not None and self._within_limits(event)):
                return event
        return None

    def send(self, arrival: Arrival, frames: Frames) -> None:
        """See Listener.send."""
        self._check_open()
        check_limits(frames, self._max_frame_bytes)
        with self._lock:
            connection = self._connections.get(arrival.peer)
            if connection is not None:
                connection.inbox.put(_private_copy(frames))

    def interrupt(self) -> None:
        """See Listener.interrupt."""
        self._interrupted = True
        self._inbox.put(None)

    def close(self) -> None:
        """See Listener.close."""
        with _listeners_lock:
            if _listeners.get(self._address.target) is self:
                del _listeners[self._address.target]
        with self._lock:
            self._closed = True
            for connection in self._connections.values():
                connection.inbox.put(None)
            self._connections.clear()
        self._inbox.put(None)

    def accept(self) -> _Connection | None:
        """A new connection for ``connect_memory``; None once closed."""
        with self._lock:
            if self._closed:
                return None
            connection = _Connection(self, f"mem-{next(self._numbers)}".encode())
            self._connections[connection.peer] = connection
            return connection

    def deliver(self, connection: _Connection, frames: Frames) -> bool:
        """Take one message from a client; False when its connection is gone."""
        with self._lock:
            if connection.peer not in self._connections:
                return False
            self._inbox.put(Arrival(connection.peer, frames))
            return True

    def drop(self, connection: _Connection) -> None:
        """End one connection; what it has already received stays readable."""
        with self._lock:
            if self._connections.pop(connection.peer, None) is not None:
                connection.inbox.put(None)
                self._inbox.put(Departure(connection.peer))

    def _within_limits(self, arrival: Arrival) -> bool:
        """Refuse a message over the limits together with its connection."""
        try:
            check_limits(arrival.frames, self._max_frame_bytes)
        except ProtocolError:
            with self._lock:
                connection = self._connections.get(arrival.peer)
            if connection is not None:
                self.drop(connection)
            return False
        return True


def _private_copy(frames: Frames) -> Frames:
    """Tensors that the other side cannot change, like bytes that have crossed a real line."""
    return Frames(frames.control, tuple(memoryview(bytearray(tensor)) for tensor in frames.tensors))
