"""Memory that was freed and that the C library, or the memory of secrets, still holds, given back to the system.

glibc keeps freed memory that lies below something that is still in use, in each of the heaps that threads allocate
from. The pads of a session are many pieces of 4 to 200 kB, made by a thread of its own, so each lost session could
leave its pads' memory behind in another heap. With two heaps there are no others.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

HEAPS = 2  # the threads that allocate much are two: steps of the engine, and the filler of pads
_ARENA_MAX = -8  # M_ARENA_MAX of mallopt(3)


def few_heaps() -> None:
    """For a process that runs for long, before it has threads. Nothing happens where there is no glibc."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_ARENA_MAX, HEAPS)


def give_back_freed_memory() -> None:
    """For now and then, not for each call: it looks through all heaps. Those are of glibc: others are left alone."""
    from tsqp.arith.secret_memory import secret_memory  # with numpy, which `few_heaps` must not load

    secret_memory().give_back()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
