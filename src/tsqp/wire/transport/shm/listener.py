"""The worker's end of all its shared-memory connections."""

from __future__ import annotations

import errno
import os
import select
import socket
from collections import deque
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from tsqp.errors import ProtocolError
from tsqp.wire.channel import MAX_FRAME_BYTES, Arrival, Departure, DirectCalls, Frames
from tsqp.wire.transport.address import Address
from tsqp.wire.transport.base import BaseListener, Deadline, check_limits
from tsqp.wire.transport.descriptors import TurnAway
from tsqp.wire.transport.shm.connection import Connection, ShmConnection
from tsqp.wire.transport.shm.packets import PACKET_BYTES
from tsqp.wire.transport.shm.spin import CROWDED_S, REST_S, SPIN_S, Spin
from tsqp.wire.transport.shm.unix import listen_at, user_of

MAX_ARENAS = 256  # each maps an arena; one more is closed as soon as it comes
_MESSAGES_IN_A_ROW = 32  # messages of one busy connection before the others, and a request to stop, are looked at


def listen_shm(
    address: Address,
    *,
    spin_s: float = SPIN_S,
    watch_fd: int | None = None,
    max_frame_bytes: int = MAX_FRAME_BYTES,
    users: Collection[int] = (),
) -> ShmListener:
    """Listen. Raises AddressInUse, AddressError, PathRefused. ``watch_fd`` as in ``listen``; it is not closed here."""
    with ExitStack() as resources:
        line, claim = listen_at(address, users)
        resources.callback(claim.release)
        resources.enter_context(line)
        allowed = frozenset((os.geteuid(), *users))
        return ShmListener(address, max_frame_bytes, line, spin_s, watch_fd, allowed, resources.pop_all())


@dataclass
class ShmDirectCalls:
    """See DirectCalls."""

    descriptor: int
    bell: int
    spin_s: float
    receive: Callable[[bytes], Arrival | None]
    crowded_s: float = CROWDED_S
    rest_s: float = REST_S
    packet_bytes: int = PACKET_BYTES

    def received(self, packet: bytes) -> Arrival | None:
        return self.receive(packet)


class ShmListener(BaseListener):
    """See Listener. After an answer it asks that connection again for a moment, then sleeps on all of them.

    What another kind of memory does otherwise: ``_new_connection``, ``_put_product``, ``direct``.
    """

    def __init__(
        self,
        address: Address,
        max_frame_bytes: int,
        line: socket.socket,
        spin_s: float,
        watch_fd: int | None,
        users: frozenset[int],
        resources: ExitStack,
    ) -> None:
        super().__init__(address, max_frame_bytes)
        self._line = line
        self._users = users
        self._spin = Spin(spin_s)
        self._resources = resources
        self._connections: dict[bytes, Connection[Any]] = {}
        self._by_fd: dict[int, Connection[Any]] = {}
        self._ready: deque[Connection[Any]] = deque()
        self._departed: deque[Departure] = deque()
        self._last: Connection[Any] | None = None  # the one answered last: the likeliest to speak next
        self._left_in_a_row = _MESSAGES_IN_A_ROW
        self._accepted = 0
        self._turn_away = TurnAway()
        resources.callback(self._turn_away.close)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        resources.callback(os.close, self._stop)
        self._epoll = resources.enter_context(select.epoll())
        self._epoll.register(line, select.EPOLLIN)
        self._epoll.register(self._stop, select.EPOLLIN)
        if watch_fd is not None:
            try:
                self._epoll.register(watch_fd, select.EPOLLIN)
            except PermissionError:  # a file, or /dev/null: it is always readable
                self._interrupted = True

    def receive(self, timeout_s: float | None) -> Arrival | Departure | None:
        """See Listener.receive."""
        self._check_open()
        self._left_in_a_row -= 1
        if not self._left_in_a_row:
            self._look(0.0)
        event = self._next_event(once=timeout_s == 0.0)
        return self._await_event(Deadline(timeout_s)) if event is None else event

    def send(self, arrival: Arrival, frames: Frames) -> None:
        """See Listener.send."""
        self._check_open()
        check_limits(frames, self._max_frame_bytes)
        connection = self._connections.get(arrival.peer)
        if connection is None:
            return
        if frames.tensors:
            self._put_product(arrival, frames)
        self._last = connection
        try:
            connection.answer(arrival.ticket, frames.control)
        except OSError:  # it is gone, or reads none of its replies
            self._drop(connection)

    def memory(self, peer: bytes) -> memoryview | None:
        """See Listener.memory."""
        connection = self._connections.get(peer)
        return None if connection is None else connection.memory

    def direct(self, peer: bytes) -> DirectCalls | None:
        """See Listener.direct."""
        self._check_open()
        connection = self._connections.get(peer)
        if connection is None or not connection.opened:
            return None
        if not self._ready:
            self._look(0.0)
        if self._interrupted or self._departed or any(other is not connection for other in self._ready):
            return None
        self._ready.clear()  # it is this one: whoever serves it will see
        self._last = None
        fileno, bell = connection.line.fileno(), self._epoll.fileno()
        return ShmDirectCalls(fileno, bell, self._spin.spin_s, lambda packet: self._taken(connection, packet))

    def interrupt(self) -> None:
        """See Listener.interrupt."""
        if not self._closed:  # afterwards the number of the descriptor may belong to something else
            os.eventfd_write(self._stop, 1)

    def close(self) -> None:
        """See Listener.close."""
        self._closed = True
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()
        self._resources.close()

    def _await_event(self, deadline: Deadline) -> Arrival | Departure | None:
        while not self._interrupted:
            happened = self._look(deadline.remaining_s)
            event = self._next_event(once=deadline.passed)
            if event is not None:
                return event
            if not happened and deadline.passed:
                break
        return None

    def _next_event(self, *, once: bool) -> Arrival | Departure | None:
        """What is known to be here, first come first served; then what comes within a short spin.

        ``once``: without the spin.
        """
        if self._interrupted:
            return None
        while self._ready and not self._departed:
            arrival = self._receive_from(self._ready.popleft())
            if arrival is not None:
                return arrival
        last, self._last = self._last, None
        if last is not None and not self._departed:
            arrival = self._spin.ask(lambda: self._receive_from(last), once=once)
            if arrival is not None:
                return arrival
        return self._departed.popleft() if self._departed else None

    def _receive_from(self, connection: Connection[Any]) -> Arrival | None:
        if connection.peer not in self._connections:
            return None  # it was dropped while it was asked
        return self._unless_it_ends(connection, connection.receive)

    def _taken(self, connection: Connection[Any], packet: bytes) -> Arrival | None:
        return self._unless_it_ends(connection, lambda: connection.received(packet))

    def _unless_it_ends(self, connection: Connection[Any], receive: Callable[[], Arrival | None]) -> Arrival | None:
        try:
            return receive()
        except BlockingIOError:
            return None
        except (EOFError, OSError, ProtocolError):
            self._drop(connection)
            return None

    def _look(self, timeout_s: float) -> bool:
        """Sleep until something is here; whether anything was."""
        self._left_in_a_row = _MESSAGES_IN_A_ROW
        happened = False
        for fd, _ in self._epoll.poll(timeout_s):
            came = True
            if fd in self._by_fd:
                self._ready.append(self._by_fd[fd])
            elif fd == self._line.fileno():
                came = self._accept()
            else:
                self._interrupted = True
            happened = happened or came
        return happened

    def _accept(self) -> bool:
        """Take in who has connected, or turn it away; False where neither can be done now."""
        try:
            line, _ = self._line.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                return self._turn_away.next_of(self._line)
            return True  # it left before it was let in
        if len(self._connections) >= MAX_ARENAS or user_of(line) not in self._users:
            line.close()
            return True
        line.setblocking(False)
        self._accepted += 1
        connection = self._new_connection(b"%d" % self._accepted, line)
        self._connections[connection.peer] = self._by_fd[line.fileno()] = connection
        self._epoll.register(line.fileno(), select.EPOLLIN)
        return True

    def _new_connection(self, number: bytes, line: socket.socket) -> Connection[Any]:
        return ShmConnection(b"shm-" + number, line, self._max_frame_bytes)

    def _put_product(self, arrival: Arrival, frames: Frames) -> None:
        """See that the product is in its place. Raises ProtocolError where it cannot be."""
        place = arrival.reply
        if len(frames.tensors) != 1 or place is None:
            raise ProtocolError("an answer over shm has one tensor, in the place that its call names")
        (product,) = frames.tensors
        if product is place:
            return
        check_fits(product, place.nbytes)
        place[:] = product.cast("B")

    def _drop(self, connection: Connection[Any]) -> None:
        """End a connection. Dropping twice is allowed."""
        if self._connections.pop(connection.peer, None) is not None:
            del self._by_fd[connection.line.fileno()]
            self._epoll.unregister(connection.line.fileno())
            connection.close()
            self._departed.append(Departure(connection.peer))


def check_fits(product: memoryview, room: int) -> None:
    """Raises ProtocolError for a product of another size than its call has room for."""
    if product.nbytes != room:
        raise ProtocolError(f"a product of {product.nbytes} bytes where its call has room for {room}")
