"""Which sockets on disk may be trusted: ours, in a directory where nobody else can put or replace one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from tsqp.errors import AddressError, WorkerUnreachable
from tsqp.private_path import SOCKET, check, check_holder
from tsqp.wire.transport.address import Address

OTHER_PATH = "use a private directory, made with mode 700"


def check_own_socket(address: Address) -> None:
    """What a client asks before it connects.

    Raises WorkerUnreachable where nothing is, PathRefused where others could have put something, AddressError.
    """
    path = address.path
    if path.parent.exists():  # where it does not, nobody listens either
        check_holder(path, OTHER_PATH)
    try:
        check(path, SOCKET, OTHER_PATH)
    except FileNotFoundError:
        raise WorkerUnreachable(f"{address}: no worker listens there; start one, or check the path") from None
    except OSError as error:
        raise AddressError(f"cannot use the socket {path}: {error.strerror}") from None


@contextmanager
def private_umask() -> Iterator[None]:
    """Sockets made inside get mode 0600. The umask is the whole process's, other threads' too: keep it short."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)
