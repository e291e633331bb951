"""Memory that was freed and that the C library still holds, given back to the system.

glibc keeps freed memory that lies below something that is still in use, in each of the heaps that threads allocate
from. The pads of a session are many pieces of 4 to 200 kB, made by a thread of its own, so each lost session could
leave its pads' memory behind in another heap.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress


def give_back_freed_memory() -> None:
    """For now and then, not for each call: it looks through all heaps. Nothing happens where there is no glibc."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
