"""How many files and connections this process may still open, and what a listener does when there are none.

libzmq ends the process where it finds no descriptor for the threads of a new context, so it is asked for one only while
there are some.
"""

from __future__ import annotations

import os
import resource
import socket
from contextlib import suppress
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


class TurnAway:
    """One descriptor that is kept, so that who connects when there is no other can be told so by the end of the line.

    Otherwise the system would announce that client again and again, for as long as it waits.
    """

    def __init__(self) -> None:
        self._kept = _nothing()

    def next_of(self, listening: socket.socket) -> bool:
        """End the next connection as soon as it is there; whether that could be done."""
        self.close()
        try:
            listening.accept()[0].close()
        except OSError:
            return False
        finally:
            with suppress(OSError):
                self._kept = _nothing()
        return True

    def close(self) -> None:
        """Keep none any more. Closing twice is allowed."""
        kept, self._kept = self._kept, -1
        if kept >= 0:
            os.close(kept)


def _nothing() -> int:
    """A descriptor, and of no file: a worker has none open but its own. Raises OSError."""
    return os.eventfd(0, os.EFD_CLOEXEC)
