"""The trusted side's view of a segment: memory for tensors, free again when the last reference to it is gone."""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from functools import lru_cache

from tsqp.errors import ArenaFull
from tsqp.wire.transport.shm.allocator import Allocator
from tsqp.wire.transport.shm.packets import NO_BYTES, Region
from tsqp.wire.transport.shm.segment import Backed

_Block = ctypes.Array[ctypes.c_ubyte]


class Arena:
    """Lays out one segment. Nothing in it depends on what the worker says or writes."""

    def __init__(self, segment: Backed) -> None:
        self._segment = segment
        self._memory = segment.memory
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._allocator = Allocator(segment.size)
        # A block may die in any thread, also in the middle of a method here: its end is noted now and acted on later.
        self._ended: deque[weakref.KeyedRef[int, _Block]] = deque()
        self._alive: dict[int, weakref.KeyedRef[int, _Block]] = {}

    @property
    def taken_bytes(self) -> int:
        """Bytes that something still refers to."""
        self._free_ended()
        return self._allocator.taken_bytes

    def reserve(self, size: int) -> tuple[memoryview, Region]:
        """``size`` bytes, taken until the view and everything made over it are gone. Raises ArenaFull."""
        if size == 0:
            return memoryview(bytearray()), NO_BYTES
        self._free_ended()
        offset = self._allocator.allocate(size)
        if offset is None or not self._segment.back(offset + size):
            raise ArenaFull(self._describe_full(size, offset), fields=("arena_bytes",))
        # The array, not a view, is what every slice, cast and tensor made over it keeps alive.
        block = _block_type(size).from_buffer(self._memory, offset)
        self._alive[offset] = weakref.KeyedRef(block, self._ended.append, offset)
        return memoryview(block).cast("B"), Region(offset, size)

    def region_of(self, tensor: memoryview) -> Region | None:
        """Where a tensor lies in the arena; None if it lies elsewhere, or not all of it in here."""
        if not tensor.nbytes:
            return NO_BYTES
        if tensor.readonly:
            return None
        offset = ctypes.addressof(ctypes.c_char.from_buffer(tensor)) - self._address
        if offset >= 0 and offset + tensor.nbytes <= self._segment.size:
            return Region(offset, tensor.nbytes)
        return None

    def _free_ended(self) -> None:
        while self._ended:
            offset = self._ended.popleft().key
            del self._alive[offset]
            self._allocator.free(offset)

    def _describe_full(self, size: int, offset: int | None) -> str:
        if offset is not None:
            self._allocator.free(offset)
            return (
                f"the disk of the arena has no room for a tensor of {size} bytes; set XDG_RUNTIME_DIR to a larger one"
            )
        return (
            f"a tensor of {size} bytes does not fit into the arena of {self._segment.size} bytes, of which "
            f"{self._allocator.taken_bytes} are in use: send fewer rows at a time, or choose more by arena_bytes"
        )


@lru_cache(maxsize=256)  # making a type costs more than everything else in here, and a model has few sizes
def _block_type(size: int) -> type[_Block]:
    return ctypes.c_ubyte * size
