"""ZeroMQ over ipc and tcp: the trusted side connects with a DEALER, the worker listens with a ROUTER.

Each socket has a context of its own. So ``close`` returns when nothing of the connection is left, neither a thread nor
memory that is still to be sent, and each connection has a thread of its own that encrypts and that no other peer holds
up. It costs ten descriptors and two threads for each worker of a team, whose size is bounded for that.

Covers: a dead worker is noticed at once, oversize frames are refused before they are allocated, nothing reconnects;
where descriptors run out, connecting is an error and not the end of the process (tests/wire/test_descriptors.py).
Does not cover: a peer that sends frame after frame of one endless message, each within its limit, until memory runs
out; ZeroMQ hands over whole messages only. Assumes: for ipc, that root and this user are trusted.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress

import zmq
from zmq.utils.monitor import recv_monitor_message

from tsqp.errors import (
    AddressError,
    AddressInUse,
    DeadlineExceeded,
    ProtocolError,
    WorkerLost,
    WorkerUnreachable,
)
from tsqp.wire.channel import MAX_FRAME_BYTES, Arrival, Frames
from tsqp.wire.transport import tcp
from tsqp.wire.transport.address import Address
from tsqp.wire.transport.base import (
    CONNECT_TIMEOUT_S,
    SEND_TIMEOUT_S,
    BaseChannel,
    BaseListener,
    Deadline,
    check_limits,
)
from tsqp.wire.transport.claim import AddressClaim
from tsqp.wire.transport.descriptors import PER_CONNECTION, descriptors_left
from tsqp.wire.transport.ipc import check_own_socket, private_umask
from tsqp.wire.transport.keys import ClientKeys, WorkerKeys
from tsqp.wire.transport.sockets import MOST_PARTS, configure, receive_parts, send_parts, to_frames, use_keys

# The longest that ZeroMQ knows, 24 days. "Never" (-1) would do more than not reconnect: on a disconnect it also throws
# away messages that had arrived. A channel dies at the first disconnect that it sees, so nothing is ever sent again.
_RECONNECT_MS = 2**31 - 1

_HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_ENDED = zmq.EVENT_CLOSED | zmq.EVENT_DISCONNECTED
_WATCHED = zmq.EVENT_HANDSHAKE_SUCCEEDED | _HANDSHAKE_FAILED | _ENDED

_opening = threading.Lock()  # from the count of descriptors until a context has its own


def connect_zmq(
    address: Address,
    *,
    security: ClientKeys | None = None,
    insecure_plain_tcp: bool = False,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
    max_frame_bytes: int = MAX_FRAME_BYTES,
) -> ZmqChannel:
    """Connect, and return once the worker has answered the handshake (for CURVE: proved that it has its key).

    Raises WorkerUnreachable within ``connect_timeout_s`` seconds, AddressError, PathRefused.
    """
    encrypted = security is not None
    endpoint = _endpoint_to_reach(address, encrypted=encrypted, insecure_plain_tcp=insecure_plain_tcp)
    try:
        with ExitStack() as resources:
            socket = _dealer(resources, address)
            configure(socket, endpoint, max_frame_bytes)
            socket.reconnect_ivl = _RECONNECT_MS
            if security is not None:
                use_keys(socket, security.own)
                socket.curve_serverkey = security.worker
            monitor = socket.get_monitor_socket(_WATCHED)
            resources.callback(monitor.close)
            resources.callback(socket.disable_monitor)
            socket.connect(str(endpoint))
            _await_handshake(monitor, address, Deadline(connect_timeout_s), encrypted=encrypted)
            return ZmqChannel(address, max_frame_bytes, socket, monitor, resources.pop_all())
    except zmq.ZMQError as error:
        raise WorkerUnreachable(f"{address}: cannot be connected to: {error.strerror}") from None


def listen_zmq(
    address: Address,
    *,
    security: WorkerKeys | None = None,
    insecure_plain_tcp: bool = False,
    watch_fd: int | None = None,
    max_frame_bytes: int = MAX_FRAME_BYTES,
) -> ZmqListener:
    """Listen; port 0 lets the system choose one. Raises AddressInUse, AddressError, PathRefused.

    ``watch_fd``, when it becomes readable or its other end closes, counts as ``interrupt``. It is not closed here.
    """
    with ExitStack() as resources:
        if address.transport == "ipc":
            resources.callback(AddressClaim.acquire(address).release)
        socket = _socket(resources, zmq.ROUTER)
        socket.router_mandatory = True  # a send that cannot be queued says so, instead of losing the message
        if address.transport == "ipc":
            _bind_ipc(socket, address, max_frame_bytes)
        else:
            address = _bind_tcp(socket, resources, address, security, insecure_plain_tcp, max_frame_bytes)
        return ZmqListener(address, max_frame_bytes, socket, watch_fd, resources.pop_all())


class ZmqChannel(BaseChannel):
    """The trusted side's end."""

    def __init__(
        self,
        address: Address,
        max_frame_bytes: int,
        socket: zmq.Socket[bytes],
        monitor: zmq.Socket[bytes],
        resources: ExitStack,
    ) -> None:
        super().__init__(address, max_frame_bytes)
        self._socket = socket
        self._monitor = monitor
        self._resources = resources
        self._readable = self._poller(zmq.POLLIN)
        self._writable = self._poller(zmq.POLLOUT)

    def _send(self, frames: Frames, reply_bytes: int) -> None:
        del reply_bytes  # the reply comes with its own length, within the limits
        deadline = Deadline(SEND_TIMEOUT_S)
        while not self._worker_gone():
            with suppress(zmq.Again):
                return send_parts(self._socket, (), frames)
            if deadline.passed:
                raise DeadlineExceeded("takes no more calls; it has stalled", address=self.address)
            self._writable.poll(deadline.remaining_ms)
        raise self._lost()

    def _receive(self, deadline_s: float) -> Frames:
        deadline = Deadline(deadline_s)
        while True:
            gone = self._worker_gone()  # asked first, so that what arrived before the end is still read below
            with suppress(zmq.Again):
                return to_frames(receive_parts(self._socket, MOST_PARTS), self._max_frame_bytes)
            if gone:
                raise self._lost()
            if deadline.passed:
                raise self._nothing_came()
            self._readable.poll(deadline.remaining_ms)

    def _arrived_within(self, deadline: Deadline) -> bool:
        while True:
            if self._readable.poll(deadline.remaining_ms):
                return True
            if deadline.passed:
                return False

    def _release(self) -> None:
        self._resources.close()

    def _worker_gone(self) -> bool:
        """Nothing but the end of the connection is reported after the handshake; left unread, it stays readable."""
        return bool(int(self._monitor.get(zmq.EVENTS)) & zmq.POLLIN)

    def _poller(self, event: int) -> zmq.Poller:
        """Waits for the socket, and for the end of the connection."""
        poller = zmq.Poller()
        poller.register(self._socket, event)
        poller.register(self._monitor, zmq.POLLIN)
        return poller

    def _lost(self) -> WorkerLost:
        return WorkerLost("went away; start it again and connect anew", address=self.address)


class ZmqListener(BaseListener):
    """The worker's end."""

    def __init__(
        self,
        address: Address,
        max_frame_bytes: int,
        socket: zmq.Socket[bytes],
        watch_fd: int | None,
        resources: ExitStack,
    ) -> None:
        super().__init__(address, max_frame_bytes)
        self._socket = socket
        self._resources = resources
        self._stops = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)]
        resources.callback(os.close, self._stops[0])
        if watch_fd is not None:
            self._stops.append(watch_fd)
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        for fd in self._stops:
            self._poller.register(fd, zmq.POLLIN | zmq.POLLERR)  # a pipe whose writer is gone only reports the latter

    def receive(self, timeout_s: float | None) -> Arrival | None:
        """See Listener.receive."""
        self._check_open()
        deadline = Deadline(timeout_s)
        while not self._interrupted:
            ready = dict(self._poller.poll(deadline.remaining_ms))
            self._interrupted = self._interrupted or any(fd in ready for fd in self._stops)
            if self._interrupted:
                break
            arrival = self._next_arrival() if ready else None
            if arrival is not None or deadline.passed:
                return arrival
        return None

    def send(self, arrival: Arrival, frames: Frames) -> None:
        """See Listener.send."""
        self._check_open()
        check_limits(frames, self._max_frame_bytes)
        try:
            send_parts(self._socket, (arrival.peer,), frames)
        except zmq.Again:
            pass  # a client that reads none of its last 1,024 replies must not stop the others
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise

    def interrupt(self) -> None:
        """See Listener.interrupt."""
        if not self._closed:  # afterwards the number of the descriptor may belong to something else
            os.eventfd_write(self._stops[0], 1)

    def close(self) -> None:
        """See Listener.close."""
        self._closed = True
        self._resources.close()

    def _next_arrival(self) -> Arrival | None:
        """One message, or None for one that is not allowed: it is dropped, and its sender will miss the reply."""
        try:
            peer, *parts = receive_parts(self._socket, 1 + MOST_PARTS)
            if self._address.transport == "ipc" and not _sent_by_this_user(peer):
                return None
            return Arrival(peer.bytes, to_frames(parts, self._max_frame_bytes))
        except (zmq.Again, ProtocolError):
            return None


def _socket(resources: ExitStack, kind: int) -> zmq.Socket[bytes]:
    """A socket in a context of its own, so that closing it leaves no thread and no descriptor behind."""
    context = zmq.Context()
    resources.callback(context.term)
    socket = context.socket(kind)
    resources.callback(socket.close, 0)
    return socket


def _dealer(resources: ExitStack, address: Address) -> zmq.Socket[bytes]:
    """The same for a connection, where enough descriptors are left. Raises WorkerUnreachable."""
    with _opening:  # the context takes its descriptors with its first socket
        if descriptors_left() < PER_CONNECTION:
            raise WorkerUnreachable(
                f"{address}: this process has too few descriptors left for a connection: raise the limit (ulimit -n)"
            )
        return _socket(resources, zmq.DEALER)


def _endpoint_to_reach(address: Address, *, encrypted: bool, insecure_plain_tcp: bool) -> Address:
    if address.transport == "ipc":
        check_own_socket(address)
        return address
    if address.port == 0:
        raise AddressError(f"{address}: port 0 can only be listened on; give the port that was printed there")
    return tcp.resolve(address, encrypted=encrypted, insecure_plain_tcp=insecure_plain_tcp)


def _await_handshake(monitor: zmq.Socket[bytes], address: Address, deadline: Deadline, *, encrypted: bool) -> None:
    while monitor.poll(deadline.remaining_ms):
        event = recv_monitor_message(monitor)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            return
        if event & _HANDSHAKE_FAILED and encrypted:
            raise WorkerUnreachable(
                "was not reached: the keys did not match; check both public keys and its list", address=str(address)
            )
        if event & _HANDSHAKE_FAILED:
            raise WorkerUnreachable(
                f"{address}: no worker of this version answers, or it asks for worker.key and worker.server_key",
                fields=("worker.key", "worker.server_key"),
            )
        raise WorkerUnreachable(f"{address}: no worker listens there; start one, or check the address")
    raise WorkerUnreachable(f"{address}: no worker answered in time; check that it runs and is not stopped")


def _bind_ipc(socket: zmq.Socket[bytes], address: Address, max_frame_bytes: int) -> None:
    configure(socket, address, max_frame_bytes)
    socket.setsockopt(zmq.IPC_FILTER_UID, os.geteuid())
    with private_umask():  # the socket's mode follows it: 0600
        _bind(socket, address, address)


def _bind_tcp(
    socket: zmq.Socket[bytes],
    resources: ExitStack,
    address: Address,
    security: WorkerKeys | None,
    insecure_plain_tcp: bool,
    max_frame_bytes: int,
) -> Address:
    endpoint = tcp.resolve(address, encrypted=security is not None, insecure_plain_tcp=insecure_plain_tcp)
    configure(socket, endpoint, max_frame_bytes)
    if security is not None:
        use_keys(socket, security.own)
        socket.curve_server = True
        resources.callback(_admit(socket, security.clients))
    _bind(socket, endpoint, address)
    return address.with_port(int(bytes(socket.getsockopt(zmq.LAST_ENDPOINT)).rpartition(b":")[2]))


def _bind(socket: zmq.Socket[bytes], endpoint: Address, address: Address) -> None:
    try:
        socket.bind(str(endpoint))
    except zmq.ZMQError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(f"{address} is in use; stop what listens there or choose another") from None
        raise AddressError(f"cannot listen on {address}: {error.strerror}") from None


class _AllowedKeys:
    """Asked by ZeroMQ's authenticator for each client, after the client has proved that it holds the key."""

    def __init__(self, allowed: frozenset[bytes]) -> None:
        self._allowed = allowed

    def callback(self, domain: str, key: bytes) -> bool:
        del domain
        return key in self._allowed


def _admit(socket: zmq.Socket[bytes], allowed: frozenset[bytes]) -> Callable[[], None]:
    """Let in these clients only; must be called before bind. Returns what ends it, after the socket is closed."""
    from zmq.auth.thread import ThreadAuthenticator  # pulls in asyncio; only a worker with keys needs it

    authenticator = ThreadAuthenticator(socket.context)
    authenticator.start()
    authenticator.configure_curve_callback("*", _AllowedKeys(allowed))
    return authenticator.stop


def _sent_by_this_user(part: zmq.Frame) -> bool:
    """What the kernel says about the sender, beside the filter at accept: ``localhost:UID:GID:PID``."""
    fields = str(part.get("Peer-Address")).split(":")
    return len(fields) == 4 and fields[1] == str(os.geteuid())
