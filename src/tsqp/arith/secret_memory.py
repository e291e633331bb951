"""Memory for keys, pads and check vectors: in no core dump, and full of zeros in a forked process.

Covers: both, for what is made here, as the kernel shows it (tests/arith/test_secret_memory.py). Does not cover: copies
in registers, on stacks and in libraries; memory that is written to swap (``tee/memory.py``). Assumes: Linux; elsewhere
this is plain memory. What is handed out is not cleared: its owner overwrites it before and after.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections import defaultdict
from contextlib import suppress
from functools import cache, lru_cache
from typing import Any

import numpy as np

MADV_WIPEONFORK = 18  # which the module mmap does not name in every version
SLAB_BYTES = 1 << 16  # pieces of at most MOST_SMALL bytes are cut from one of these
MOST_SMALL = SLAB_BYTES // 4
LEAST_PIECE = 64

Array = np.ndarray[Any, np.dtype[Any]]
_Spare = tuple[mmap.mmap, int]  # a mapping, and the address of a part of it


class SecretMemory:
    """Hands out pieces, and takes each back once nothing refers to it: a pool is used up and filled in turns."""

    def __init__(self) -> None:
        # Appended to by whichever thread lets go of a piece, at any moment: so there is no lock, only atomic steps.
        self._spare: dict[int, list[_Spare]] = defaultdict(list)

    def piece(self, size: int) -> Any:
        """A ctypes array of ``size`` bytes with anything in them."""
        small = size <= MOST_SMALL
        held = _power_of_two(size) if small else -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        spare = self._spare[held]
        try:
            mapping, address = spare.pop()  # the last one: it may still be in a cache
        except IndexError:
            mapping = _mapping(SLAB_BYTES if small else held)
            address = ctypes.addressof(ctypes.c_ubyte.from_buffer(mapping))
            if small:
                spare.extend((mapping, address + offset) for offset in range(held, SLAB_BYTES, held))
        piece = _piece_type(size, held).from_address(address)
        piece.memory, piece.mapping = self, mapping
        return piece

    def take_back(self, held: int, mapping: mmap.mmap, address: int) -> None:
        """Of a piece that is gone: ``held`` bytes, to be used again."""
        self._spare[held].append((mapping, address))

    def spare_bytes(self) -> int:
        """What large pieces hold that nobody uses."""
        return sum(held * len(self._spare[held]) for held in tuple(self._spare) if held > MOST_SMALL)

    def give_back(self, keep: int = 0) -> None:
        """Let the system have large pieces that nobody uses, but for ``keep`` bytes of them.

        Unmapping pages takes as long as a good part of the work on them, so nothing does it but who has the time.
        """
        for held in tuple(self._spare):
            while held > MOST_SMALL and self._spare[held] and self.spare_bytes() > keep:
                with suppress(IndexError):  # another thread may have taken it
                    del self._spare[held][0]  # nothing refers to the mapping then


def secret_array(shape: tuple[int, ...], dtype: Any = np.uint32) -> Array:
    """An array with anything in it."""
    return np.ndarray(shape, dtype, secret_memory().piece(math.prod(shape) * np.dtype(dtype).itemsize))


def secret_copy(values: Array) -> Array:
    """A copy of an array."""
    copied = secret_array(values.shape, values.dtype)
    copied[...] = values
    return copied


def secret_bytes(values: bytes | bytearray | memoryview) -> memoryview:
    """A copy of bytes, which can be overwritten."""
    # Of an array: the collector of garbage does not follow it to the piece. A view of the piece itself, in a cycle that
    # it collects, would let the piece be handed out again before finalisers that may still write to the view.
    copied = secret_array((len(values),), np.uint8).data
    copied[:] = values
    return copied


@cache
def secret_memory() -> SecretMemory:
    """One for the process."""
    return SecretMemory()


def _power_of_two(size: int) -> int:
    """What a small piece takes: so many of one size fill a slab."""
    return 1 << max(LEAST_PIECE - 1, size - 1).bit_length()


def _mapping(size: int) -> mmap.mmap:
    """Private memory of the process, marked where the system has such marks."""
    if sys.platform != "linux":
        return mmap.mmap(-1, size)
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a shared one cannot be wiped
    for advice in (mmap.MADV_DONTDUMP, MADV_WIPEONFORK):
        try:
            mapping.madvise(advice)
        except OSError:  # a kernel without it: the guard refuses to work in a forked process, and dumps are off
            continue
    return mapping


@lru_cache(maxsize=256)  # making a type costs more than everything else in here, and a model has few sizes
def _piece_type(size: int, held: int) -> type[Any]:
    """Arrays of ``size`` bytes, of the ``held`` that come back; every array and view made over one keeps it.

    Without a finalizer of ``weakref`` and without ``from_buffer``, which make five objects more for the collector of
    garbage to look at: a full pool has tens of thousands of pieces.
    """

    class Piece(ctypes.c_ubyte * size):  # type: ignore[misc]
        __slots__ = ("mapping", "memory")

        def __del__(self) -> None:
            self.memory.take_back(held, self.mapping, ctypes.addressof(self))

    return Piece
