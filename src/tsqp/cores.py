"""How many processors this process may use: what every side, command and benchmark takes when nobody says how many."""

from __future__ import annotations

import os


def cores() -> int:
    """Processors of this process's affinity mask, which a container or ``taskset`` may have narrowed."""
    return len(os.sched_getaffinity(0))
