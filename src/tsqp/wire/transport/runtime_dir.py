"""The directory for sockets that nobody named: private to this user, swept of what dead workers left."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from pathlib import Path

from tsqp.errors import AddressError, RuntimeDirectoryError
from tsqp.wire.transport.address import parse_address
from tsqp.wire.transport.claim import LOCK_SUFFIX, AddressClaim, serialised

SOCKET_SUFFIX = ".sock"


def runtime_directory() -> Path:
    """``$XDG_RUNTIME_DIR/tsqp``, or ``tsqp-UID`` in the temporary directory; created with mode 0700.

    Raises RuntimeDirectoryError unless it is a directory that this user owns and nobody else can enter.
    """
    directory = _location()
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        pass  # made by an earlier run, or by someone who knew the name: checked below either way
    except OSError as error:
        raise RuntimeDirectoryError(
            f"cannot create {directory}: {error.strerror}; set XDG_RUNTIME_DIR to a private directory"
        ) from None
    _check_private(directory)
    return directory


def new_ipc_address() -> str:
    """A fresh address that no other worker has or will get; what dead workers left is removed on the way.

    Raises RuntimeDirectoryError, and AddressError where the directory's path is too long for a socket in it.
    """
    directory = runtime_directory()
    reclaim_stale(directory)
    return str(parse_address(str(directory / f"worker-{secrets.token_hex(8)}{SOCKET_SUFFIX}")))


def reclaim_stale(directory: Path) -> list[Path]:
    """Remove the sockets and locks of dead workers from our runtime directory and return the sockets' paths.

    A live worker holds its lock and is left alone. Raises RuntimeDirectoryError for a directory not ours alone.
    """
    _check_private(directory)
    reclaimed = []
    with serialised(directory):
        for lock in sorted(directory.glob(f"*{SOCKET_SUFFIX}{LOCK_SUFFIX}")):
            path = lock.with_name(lock.name.removesuffix(LOCK_SUFFIX))
            try:
                AddressClaim.acquire_serialised(path).release()
            except AddressError:
                continue  # a live worker (AddressInUse), or something that is not ours to remove
            reclaimed.append(path)
    return reclaimed


def _location() -> Path:
    """Where the runtime directory belongs; an XDG_RUNTIME_DIR that is not usable is as good as none."""
    named = os.environ.get("XDG_RUNTIME_DIR", "")
    if named.startswith("/") and Path(named).is_dir() and os.access(named, os.W_OK | os.X_OK):
        return Path(named) / "tsqp"
    return Path(tempfile.gettempdir()) / f"tsqp-{os.geteuid()}"


def _check_private(directory: Path) -> None:
    problem = _problem_with(directory)
    if problem is not None:
        raise RuntimeDirectoryError(
            f"the runtime directory {directory} {problem}; remove it, or set XDG_RUNTIME_DIR to a private directory"
        )


def _problem_with(directory: Path) -> str | None:
    try:
        info = directory.lstat()
    except OSError as error:
        return f"cannot be used ({error.strerror})"
    if stat.S_ISLNK(info.st_mode):
        return "is a symbolic link"
    if not stat.S_ISDIR(info.st_mode):
        return "is not a directory"
    if info.st_uid != os.geteuid():
        return "belongs to another user"
    if info.st_mode & 0o077:
        return "can be entered or read by others"
    return None
