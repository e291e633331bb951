"""The directory for sockets that nobody named: private to this user, swept of what dead workers left."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from tsqp.errors import AddressError, RuntimeDirectoryError
from tsqp.wire.transport.address import Address, Transport, parse_address
from tsqp.wire.transport.claim import LOCK_SUFFIX, AddressClaim, serialised

SOCKET_SUFFIX = ".sock"
ARENA_SUFFIX = ".arena"


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
    return _new_address("ipc")


def new_shm_address() -> str:
    """The same for shared memory."""
    return _new_address("shm")


def create_arena_file() -> tuple[int, Path]:
    """A new empty file for shared memory, mode 0600, and a descriptor that locks it while its maker lives.

    The maker removes it as soon as the worker has it, so only a kill in between leaves it to ``reclaim_stale``.
    Raises RuntimeDirectoryError, OSError.
    """
    directory = runtime_directory()
    path = directory / f"{secrets.token_hex(8)}{ARENA_SUFFIX}"
    with serialised(directory):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody else knows the file yet
    return fd, path


def reclaim_stale(directory: Path) -> list[Path]:
    """Remove what dead processes left in our runtime directory: sockets, locks and arenas. Returns their paths.

    A live process holds its lock and is left alone. Raises RuntimeDirectoryError for a directory not ours alone.
    """
    _check_private(directory)
    reclaimed = []
    with serialised(directory):
        for lock in sorted(directory.glob(f"*{SOCKET_SUFFIX}{LOCK_SUFFIX}")):
            path = lock.with_name(lock.name.removesuffix(LOCK_SUFFIX))
            try:
                AddressClaim.acquire_serialised(Address("ipc", str(path))).release()
            except AddressError:
                continue  # a live worker (AddressInUse), or something that is not ours to remove
            reclaimed.append(path)
        reclaimed += [path for path in sorted(directory.glob(f"*{ARENA_SUFFIX}")) if _reclaim_arena(path)]
    return reclaimed


def _new_address(transport: Transport) -> str:
    directory = runtime_directory()
    reclaim_stale(directory)
    return str(parse_address(f"{transport}://{directory}/worker-{secrets.token_hex(8)}{SOCKET_SUFFIX}"))


def _reclaim_arena(path: Path) -> bool:
    """Remove an arena whose maker is gone; whether it was removed."""
    with suppress(OSError):  # it was removed just now, or is locked, or is not a file of ours
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if stat.S_ISREG(os.fstat(fd).st_mode):
                path.unlink()
                return True
        finally:
            os.close(fd)
    return False


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
