"""How much memory keys and values may take, where a run does not say so: half of what is available."""

from __future__ import annotations

from tsqp.api.arena import SHARE
from tsqp.api.memory_limits import available_bytes

LEAST_BYTES = 64 << 20  # also where next to nothing is available: a request that does not fit is refused


def fitting_kv_memory() -> int:
    """Bytes: half of the memory that the system has available, or that the least of the limits found leaves."""
    return max(LEAST_BYTES, (available_bytes() or 0) // SHARE)
