"""The socket of a shared-memory connection: packets between two processes, and the kernel's word on whose they are.

Covers: without a word from an operator both ends are one user's, and nobody else can even reach the socket; with one,
each end accepts exactly the users it was told of, whoever else can reach the socket (tests/wire/test_shm_hostile.py,
tests/wire/test_shm_users.py). Assumes: the kernel's SO_PEERCRED.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Collection
from contextlib import ExitStack

from tsqp.errors import AddressError, WorkerUnreachable
from tsqp.wire.transport.address import Address
from tsqp.wire.transport.claim import AddressClaim
from tsqp.wire.transport.ipc import check_own_socket, private_umask

_BACKLOG = 128
_BUFFER_BYTES = 1 << 20  # of packets under way in one direction; the system may give less


def dial(address: Address, timeout_s: float, user: int | None = None) -> socket.socket:
    """Connect to a worker of this user, or of ``user``. Raises WorkerUnreachable, AddressError, PathRefused."""
    if user is None:
        check_own_socket(address)  # of another user the path says nothing: who listens is asked below
    with ExitStack() as undo:
        line = undo.enter_context(_new_socket())
        # The kernel waits this long for room in the worker's queue of connections, and not at all for anything else.
        line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout_s))
        try:
            line.connect(str(address.path))
        except BlockingIOError:
            raise WorkerUnreachable(f"{address}: no worker answered in time; check that it runs") from None
        except OSError as error:
            if error.errno == errno.EPROTOTYPE:
                raise WorkerUnreachable("has another transport; try ipc://", address=str(address)) from None
            if error.errno == errno.EACCES:
                raise WorkerUnreachable(f"{address}: this user may not connect there; see --allow-user") from None
            raise WorkerUnreachable(f"{address}: no worker listens there; start one, or check the path") from None
        if user_of(line) != (os.geteuid() if user is None else user):
            other = "another user" if user is None else f"a user other than {user}"
            raise AddressError(f"{address}: the process that listens there belongs to {other}; it is not used")
        line.setblocking(False)
        undo.pop_all()
        return line


def listen_at(address: Address, users: Collection[int] = ()) -> tuple[socket.socket, AddressClaim]:
    """A listening socket, and the claim to release after. Raises AddressInUse, AddressError, PathRefused.

    Its mode is 0600, or 0666 where other ``users`` are let in: who connects is asked of the kernel.
    """
    with ExitStack() as undo:
        claim = AddressClaim.acquire(address)
        undo.callback(claim.release)
        line = undo.enter_context(_new_socket())
        line.setblocking(False)
        try:
            with private_umask():
                line.bind(str(address.path))
            line.listen(_BACKLOG)
            if users:
                address.path.chmod(0o666)
        except OSError as error:
            raise AddressError(f"cannot listen on {address}: {error.strerror}") from None
        undo.pop_all()
        return line, claim


def user_of(line: socket.socket) -> int:
    """The user id that opened the other end, as the kernel recorded it then."""
    return _credentials(line)[1]


def process_of(line: socket.socket) -> int:
    """The process id of the same; 0 for one that this process's namespace does not show."""
    return _credentials(line)[0]


def _credentials(line: socket.socket) -> tuple[int, int, int]:
    credentials = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    process, user, group = struct.unpack("3i", credentials)
    return process, user, group


def _new_socket() -> socket.socket:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    return line


def _timeval(seconds: float) -> bytes:
    whole = int(seconds)
    return struct.pack("ll", whole, max(1, int((seconds - whole) * 1e6)))
