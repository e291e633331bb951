"""Which sockets on disk may be trusted: ours, in a directory where nobody else can put or replace one."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tsqp.errors import AddressError, WorkerUnreachable
from tsqp.wire.transport.address import Address


def check_parent(path: Path) -> None:
    """Raise AddressError unless only we (or root) can create and remove files beside this socket."""
    parent = path.parent
    try:
        info = parent.stat()
    except OSError as error:
        raise AddressError(f"cannot use {parent} for a socket: {error.strerror}; create it with mode 700") from None
    if not stat.S_ISDIR(info.st_mode):
        raise AddressError(f"cannot use {parent} for a socket: it is not a directory")
    if info.st_uid not in (os.geteuid(), 0):
        raise AddressError(f"cannot use {parent} for a socket: another user owns it; use a private directory")
    # The sticky bit of /tmp is not enough: others could take the name first and wait for us to connect.
    if info.st_mode & 0o022:
        raise AddressError(f"cannot use {parent} for a socket: others can write to it; use a private directory")


def check_own_socket(address: Address) -> None:
    """What a client asks before it connects. Raises WorkerUnreachable where nothing is, AddressError where not ours."""
    path = address.path
    if path.parent.exists():  # where it does not, nobody listens either
        check_parent(path)
    try:
        info = path.lstat()  # a symlink is not followed: it is not a socket of ours
    except FileNotFoundError:
        raise WorkerUnreachable(f"{address}: no worker listens there; start one, or check the path") from None
    except OSError as error:
        raise AddressError(f"cannot use the socket {path}: {error.strerror}") from None
    if not stat.S_ISSOCK(info.st_mode):
        raise AddressError(f"{path} is not a socket; check the path")
    if info.st_uid != os.geteuid():
        raise AddressError(f"the socket {path} belongs to another user; it is not used")


@contextmanager
def private_umask() -> Iterator[None]:
    """Sockets made inside get mode 0600. The umask is the whole process's, other threads' too: keep it short."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)
