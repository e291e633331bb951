"""A lock that goes to whoever has waited longest.

With a plain lock a thread that makes one pass after another would take it again before those who wait have woken up.
"""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """A context manager that one thread is in at a time; the others come in the order in which they asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._waiting = deque[threading.Lock]()  # each is released to hand the turn over

    def locked(self) -> bool:
        """Whether it is somebody's turn."""
        return self._taken

    def wait(self, most_s: float = -1) -> bool:
        """Take a turn, to be given back by ``end``; False where none has come after ``most_s`` seconds."""
        with self._lock:
            if not self._taken:
                self._taken = True
                return True
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        came = False
        try:
            came = mine.acquire(timeout=most_s)
        finally:
            if not came:  # late or interrupted: nobody may hand the turn over to one who has gone
                self._leave(mine)
        return came

    def end(self) -> None:
        """The next one's turn."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False

    def _leave(self, mine: threading.Lock) -> None:
        with self._lock:
            waits = mine in self._waiting
            if waits:
                self._waiting.remove(mine)
        if not waits:
            self.end()

    def __enter__(self) -> None:
        self.wait()

    def __exit__(self, *_: object) -> None:
        self.end()
