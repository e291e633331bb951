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
import weakref
from collections import defaultdict, deque
from functools import cache, lru_cache
from typing import Any

import numpy as np

MADV_WIPEONFORK = 18  # which the module mmap does not name in every version
SLAB_BYTES = 1 << 16  # small pieces are cut from one of these
LEAST_PIECE = 64
MOST_SPARE_BYTES = 32 << 20  # of large pieces of one size that wait to be used again

Array = np.ndarray[Any, np.dtype[Any]]
_Piece = ctypes.Array[ctypes.c_ubyte]


class SecretMemory:
    """Hands out pieces, and takes each back once nothing refers to it."""

    def __init__(self) -> None:
        # Appended to by whichever thread lets go of a piece, at any moment: so there is no lock, only atomic steps.
        self._spare: dict[int, deque[tuple[mmap.mmap, int]]] = defaultdict(deque)

    def piece(self, size: int) -> _Piece:
        """``size`` bytes with anything in them."""
        small = size <= SLAB_BYTES // 4
        held = _power_of_two(size) if small else -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        spare = self._spare[held]
        try:
            mapping, at = spare.popleft()
        except IndexError:
            mapping, at = _mapping(SLAB_BYTES if small else held), 0
            if small:
                spare.extend((mapping, offset) for offset in range(held, SLAB_BYTES, held))
        piece = _bytes_type(size).from_buffer(mapping, at)
        weakref.finalize(piece, self._take_back, held, mapping, at).atexit = False
        return piece

    def _take_back(self, held: int, mapping: mmap.mmap, at: int) -> None:
        spare = self._spare[held]
        if held < SLAB_BYTES or len(spare) * held < MOST_SPARE_BYTES:
            spare.append((mapping, at))  # else nothing refers to the mapping any more, and the system has it back


def secret_array(shape: tuple[int, ...], dtype: Any = np.uint32) -> Array:
    """An array with anything in it."""
    return np.frombuffer(memoryview(_memory().piece(math.prod(shape) * np.dtype(dtype).itemsize)), dtype).reshape(shape)


def secret_copy(values: Array) -> Array:
    """A copy of an array."""
    copied = secret_array(values.shape, values.dtype)
    copied[...] = values
    return copied


def secret_bytes(values: bytes | bytearray | memoryview) -> memoryview:
    """A copy of bytes, which can be overwritten."""
    copied = memoryview(_memory().piece(len(values))).cast("B")
    copied[:] = values
    return copied


@cache
def _memory() -> SecretMemory:
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
def _bytes_type(size: int) -> type[_Piece]:
    return ctypes.c_ubyte * size
