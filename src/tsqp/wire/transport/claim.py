"""One worker per socket path: a lock beside the socket, held for as long as the worker lives.

ZeroMQ's bind takes over a live socket without a word and deletes a regular file in its way, so it is only called
under a claim. The kernel drops the lock when a process dies, however it dies; so a lock that can be taken marks a
socket that nobody serves.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tsqp.errors import AddressError, AddressInUse
from tsqp.private_path import DIRECTORY, SOCKET, check, check_holder, open_private, problem_with
from tsqp.wire.transport.address import Address
from tsqp.wire.transport.ipc import OTHER_PATH

LOCK_SUFFIX = ".lock"


class AddressClaim:
    """The right to bind one socket path."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self._path = path
        self._lock_fd: int | None = lock_fd

    @classmethod
    def acquire(cls, address: Address) -> AddressClaim:
        """Take the path and remove a dead worker's socket from it.

        Raises AddressInUse while another worker lives there, PathRefused where something that is not a socket of this
        user lies there (it is never deleted) or where others could interfere, AddressError.
        """
        check_holder(address.path, OTHER_PATH)
        with serialised(address.path.parent):
            return cls.acquire_serialised(address)

    @classmethod
    def acquire_serialised(cls, address: Address) -> AddressClaim:
        """``acquire`` for a caller that holds the directory already."""
        claim = cls(address.path, _lock(address))
        try:
            _remove_dead_socket(address)
        except BaseException:
            claim._unlock()
            raise
        return claim

    def release(self) -> None:
        """Remove the socket and the lock. Releasing twice is allowed."""
        if self._lock_fd is not None:
            self._path.unlink(missing_ok=True)
            self._unlock()

    def _unlock(self) -> None:
        lock_fd, self._lock_fd = self._lock_fd, None
        if lock_fd is not None:
            lock_path(self._path).unlink(missing_ok=True)  # while still held: afterwards it may be someone else's
            os.close(lock_fd)


def lock_path(path: Path) -> Path:
    """The lock beside a socket."""
    return path.with_name(path.name + LOCK_SUFFIX)


@contextmanager
def serialised(directory: Path) -> Iterator[None]:
    """Keep other claims in this directory waiting, if it is private to us.

    Without it, a process that looks for dead workers could hold a lock just when its new owner tries to take it.
    It looks in private directories only; and in one that others can open, they could keep us waiting for ever.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if problem_with(os.fstat(fd), DIRECTORY) is None:
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _lock(address: Address) -> int:
    """A descriptor that holds the lock of a path. Raises AddressInUse, AddressError, PathRefused."""
    lock = lock_path(address.path)
    while True:
        fd = _open_lock(lock)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have unlinked the file after we opened it: then our lock guards nothing.
            if _is_file_at(fd, lock):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise _in_use(address) from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _open_lock(lock: Path) -> int:
    fd = open_private(lock, os.O_RDWR | os.O_CREAT, "remove it, or choose another path")
    if os.fstat(fd).st_size:
        os.close(fd)
        raise AddressError(f"{lock} is not a lock of ours; remove it or choose another path")
    return fd


def _is_file_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False


def _remove_dead_socket(address: Address) -> None:
    """Called under the lock, so no worker of this package serves the path."""
    path = address.path
    try:
        check(path, SOCKET, "it is left alone: choose another path")
    except FileNotFoundError:
        return
    if _is_served(path):  # by a program that knows nothing of our locks
        raise _in_use(address)
    path.unlink()


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True  # a full backlog, or another kind of socket: not known to be dead, so left alone
    return True


def _in_use(address: Address) -> AddressInUse:
    return AddressInUse(f"{address} is in use by a running worker; stop it or choose another path")
