"""The memory itself: made by the trusted side, handed to the worker, mapped by both, without a name that outlives them.

A *memfd* is sealed: nobody can shrink it under a mapping, which would kill whoever touches it (SIGBUS), and it is gone
with the last process that has it. A *file* is for where descriptors cannot be passed (Gramine). It cannot be sealed,
so a worker that truncates it can kill the trusted side; that is all that it gains. It loses its name as soon as the
worker has mapped it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path
from typing import Literal, Protocol

from tsqp.errors import AddressError, PathRefused, ProtocolError
from tsqp.private_path import open_private
from tsqp.wire.transport.runtime_dir import create_arena_file

ArenaKind = Literal["memfd", "file"]

ARENA_BYTES = 4 << 30  # of addresses; memory is taken page by page when it is first touched
MAX_ARENA_BYTES = 1 << 40
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_BACKED_STEP_BYTES = 2 << 20


class Backed(Protocol):
    """What an arena is laid out in; see ``Segment``, whose methods these are."""

    size: int
    memory: mmap.mmap

    def back(self, end: int) -> bool: ...

    def remove_name(self) -> None: ...


class Segment:
    """The trusted side's end; ``path`` is the name of a file for as long as it has one."""

    def __init__(self, kind: ArenaKind, size: int) -> None:
        """Make and map it. Raises AddressError where the system does not give it, PathRefused."""
        if not mmap.PAGESIZE <= size <= MAX_ARENA_BYTES:
            raise AddressError(f"an arena of {size} bytes; choose between {mmap.PAGESIZE} and {MAX_ARENA_BYTES}")
        self.size = size
        self.fd = -1
        self.path: Path | None = None
        try:
            if kind == "memfd":
                self.fd = os.memfd_create("tsqp-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            else:
                self.fd, self.path = create_arena_file()
            os.ftruncate(self.fd, size)
            if kind == "memfd":
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
            self.memory = mmap.mmap(self.fd, size)
        except OSError as error:
            self.close()
            raise AddressError(
                f"cannot make an arena of {size} bytes: {error.strerror}; choose fewer by arena_bytes",
                fields=("arena_bytes",),
            ) from None
        self._backed = size if kind == "memfd" else 0  # a memfd takes its pages from memory, not from a disk

    def back(self, end: int) -> bool:
        """Make sure that the bytes before ``end`` can be touched; whether they can.

        Touching a part of a file for which its disk has no room would kill this process.
        """
        if end > self._backed:
            end = min(self.size, -(-end // _BACKED_STEP_BYTES) * _BACKED_STEP_BYTES)
            try:
                os.posix_fallocate(self.fd, self._backed, end - self._backed)
            except OSError:
                return False
            self._backed = end
        return True

    def remove_name(self) -> None:
        """From now on only those who have mapped the file can reach it."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            self.path = None

    def close(self) -> None:
        """Release name and descriptor. The mapping goes with the last tensor in it."""
        self.remove_name()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def map_descriptor(fd: int) -> mmap.mmap:
    """The worker's mapping of a memfd that it was passed. Raises ProtocolError unless its size is sealed."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise ProtocolError("an arena that is not a memfd") from None
    if seals & SEALS != SEALS:
        raise ProtocolError("an arena whose size is not sealed")
    return _map(fd)


def map_file(path: str) -> mmap.mmap:
    """The worker's mapping of a file that it was told of. Raises ProtocolError unless it is this user's alone."""
    try:
        fd = open_private(Path(path), os.O_RDWR, "")
    except PathRefused as refused:
        unsafe = "is not a regular file of this user alone"
        raise ProtocolError(f"an arena that {unsafe if refused.unsafe else 'cannot be opened'}") from None
    except ValueError:
        raise ProtocolError("an arena that cannot be opened") from None
    try:
        return _map(fd)
    finally:
        os.close(fd)


def _map(fd: int) -> mmap.mmap:
    size = os.fstat(fd).st_size  # what the kernel says, not the client
    if not mmap.PAGESIZE <= size <= MAX_ARENA_BYTES:
        raise ProtocolError(f"an arena of {size} bytes")
    try:
        return mmap.mmap(fd, size)
    except (OSError, ValueError):
        raise ProtocolError("an arena that cannot be mapped for reading and writing") from None
