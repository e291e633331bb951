"""The clock by which what was verified grows old: time in which the machine is asleep counts."""

from __future__ import annotations

import time

CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # the second stands still on a Linux that is asleep


def elapsed_s() -> float:
    """Seconds since some moment."""
    return time.clock_gettime(CLOCK)
