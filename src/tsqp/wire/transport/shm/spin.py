"""Waiting for a moment without sleeping: waking up takes as long as a small call.

Each round gives way to other processes (``sched_yield``): the kernel likes to put both sides on one core, where the
other side can run only then. Where somebody else wants the core, giving way is dear: it takes a whole slice of
theirs, some milliseconds, while whoever sleeps is woken at once. So a round that took long ends the spinning, at once
and for a while.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SPIN_S = 100e-6  # how long to ask again and again before sleeping
CROWDED_S = 200e-6  # a round that takes longer means that others want this core: alone it takes a microsecond
REST_S = 0.1  # how long to sleep at once then


class Spin:
    """Asks for at most ``spin_s`` seconds. ``clock`` and ``give_way`` are for tests."""

    def __init__(
        self,
        spin_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        give_way: Callable[[], None] = os.sched_yield,
    ) -> None:
        self.spin_s = spin_s
        self._clock = clock
        self._give_way = give_way
        self._rests_until = -1.0

    def ask(self, look: Callable[[], T | None], *, once: bool = False) -> T | None:
        """What ``look`` finds; None once it is time to sleep. ``once``: after one look."""
        now = self._clock()
        if once or now < self._rests_until:
            return look()
        until = now + self.spin_s
        while True:
            self._give_way()
            found = look()
            before, now = now, self._clock()
            if now - before > CROWDED_S:
                self._rests_until = now + REST_S
                return found
            if found is not None or now >= until:
                return found
