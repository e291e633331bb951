"""The directory for sockets that nobody named: private to this user, swept of what dead workers left."""

from __future__ import annotations

import fcntl
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from tsqp.errors import AddressError, PathRefused
from tsqp.private_path import open_private, private_directory
from tsqp.wire.transport.address import Address, Transport, parse_address
from tsqp.wire.transport.claim import LOCK_SUFFIX, AddressClaim, serialised

OTHER_DIRECTORY = "set XDG_RUNTIME_DIR to a private directory"
SOCKET_SUFFIX = ".sock"
ARENA_SUFFIX = ".arena"


def runtime_directory() -> Path:
    """``$XDG_RUNTIME_DIR/tsqp``, or ``tsqp-UID`` in the temporary directory; created with mode 0700.

    Raises PathRefused unless it is a directory that this user owns and nobody else can enter.
    """
    return private_directory(_location(), OTHER_DIRECTORY)


def new_ipc_address() -> str:
    """A fresh address that no other worker has or will get; what dead workers left is removed on the way.

    Raises PathRefused, and AddressError where the directory's path is too long for a socket in it.
    """
    return _new_address("ipc")


def new_shm_address() -> str:
    """The same for shared memory."""
    return _new_address("shm")


def new_cuda_address() -> str:
    """The same for device memory."""
    return _new_address("cuda")


def create_arena_file() -> tuple[int, Path]:
    """A new empty file for shared memory, mode 0600, and a descriptor that locks it while its maker lives.

    The maker removes it as soon as the worker has it, so only a kill in between leaves it to ``reclaim_stale``.
    Raises PathRefused.
    """
    directory = runtime_directory()
    path = directory / f"{secrets.token_hex(8)}{ARENA_SUFFIX}"
    with serialised(directory):
        fd = open_private(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, OTHER_DIRECTORY)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody else knows the file yet
    return fd, path


def reclaim_stale(directory: Path) -> list[Path]:
    """Remove what dead processes left in our runtime directory: sockets, locks and arenas. Returns their paths.

    A live process holds its lock and is left alone. Raises PathRefused for a directory not ours alone.
    """
    directory = private_directory(directory, OTHER_DIRECTORY)
    reclaimed = []
    with serialised(directory):
        for lock in sorted(directory.glob(f"*{SOCKET_SUFFIX}{LOCK_SUFFIX}")):
            path = lock.with_name(lock.name.removesuffix(LOCK_SUFFIX))
            try:
                AddressClaim.acquire_serialised(Address("ipc", str(path))).release()
            except (AddressError, PathRefused):
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
    with suppress(OSError, PathRefused):  # it was removed just now, or is locked, or is not a file of ours
        fd = open_private(path, os.O_RDONLY, OTHER_DIRECTORY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
