"""Private memory of megabytes, used again within a pass.

The C library gives back to the system what is freed in one large piece, and the system clears each page of the next
one as it is touched: in a virtual machine that takes several times as long as filling pages that are there.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from functools import cache, lru_cache
from threading import Lock
from typing import Any

import numpy as np
import torch

LEAST_BYTES = 1 << 20  # less than this the C library keeps itself
MOST_WASTE = 2  # a piece holds at most so many times what is asked for

Array = np.ndarray[Any, np.dtype[Any]]


class LargeMemory:
    """Arrays whose memory comes back once nothing refers to them. It is not cleared: for private numbers only."""

    def __init__(self) -> None:
        self._spare: list[Array] = []  # bytes; appended to by whichever thread lets go of an array
        self._lock = Lock()

    def array(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array with anything in it."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size < LEAST_BYTES:
            return np.empty(shape, dtype)
        with self._lock:
            sizes = [(len(one), index) for index, one in enumerate(self._spare)]
            fitting = [index for length, index in sorted(sizes) if size <= length <= MOST_WASTE * size]
            # numpy asks the system for large pages, which torch does not.
            piece = self._spare.pop(fitting[0]) if fitting else np.empty(size, np.uint8)
        # A ctypes array, not a view, is what every view, slice and tensor made over it keeps alive.
        lent = _bytes_type(size).from_buffer(piece.data)
        weakref.finalize(lent, self._spare.append, piece).atexit = False
        return np.frombuffer(memoryview(lent), dtype).reshape(shape)

    def floats(self, rows: int, width: int) -> torch.Tensor:
        """A tensor of float32 (rows, width) with anything in it."""
        return torch.from_numpy(self.array((rows, width), np.float32))

    def give_back(self) -> None:
        """Let the system have what is spare."""
        with self._lock:
            self._spare.clear()


@cache
def large_memory() -> LargeMemory:
    """One for the process."""
    return LargeMemory()


@lru_cache(maxsize=256)  # making a type costs more than everything else in here, and a model has few sizes
def _bytes_type(size: int) -> type[ctypes.Array[ctypes.c_ubyte]]:
    return ctypes.c_ubyte * size
