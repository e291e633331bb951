"""How many files and connections this process may still open.

libzmq ends the process where it finds no descriptor for the threads of a new context, so it is asked for one only while
there are some.
"""

from __future__ import annotations

import resource
from pathlib import Path

PER_CONNECTION = 12  # descriptors of a connection over ZeroMQ, which has the most: ten, and two while it is made
SPARE = 64  # for whatever else opens files


def descriptors_left() -> int:
    """How many may still be opened; a large number where there is no limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return 1 << 20
    try:
        return limit - len(list(Path("/proc/self/fd").iterdir()))
    except OSError:  # there is none left to look with
        return 0


def connections_left() -> int:
    """How many connections may still be made, of any transport."""
    return max(0, descriptors_left() - SPARE) // PER_CONNECTION
