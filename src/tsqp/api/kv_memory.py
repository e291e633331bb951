"""How much memory keys and values may take, where a run does not say so: half of what is available."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from tsqp.api.arena import SHARE, limits_left

LEAST_BYTES = 64 << 20  # also where next to nothing is available: a request that does not fit is refused
MEMORY = Path("/proc/meminfo")


def fitting_kv_memory() -> int:
    """Bytes: half of the memory that the system has available, or that the least of the limits found leaves."""
    left = list(limits_left(None))
    with suppress(OSError):
        lines = MEMORY.read_text().splitlines()
        left += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return max(LEAST_BYTES, min(left, default=0) // SHARE)
