"""Keeps this process's memory out of swap, where that is asked for and Linux allows it.

Covers: every page of this process, those of libraries too, from the call on (tests/tee/test_memory.py). Does not cover:
hibernation, snapshots of a virtual machine, pages that were swapped out before and never touched since. Assumes: the
kernel keeps what it says. Keys and pads have more, whether memory is locked or not: ``arith/secret_memory.py``.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import sys
from pathlib import Path

from tsqp.errors import OptionError

MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4
CAP_IPC_LOCK = 14
SWAPS, STATUS, MAPPINGS = Path("/proc/swaps"), Path("/proc/self/status"), Path("/proc/self/smaps")
RAISE = "ulimit -l unlimited, LimitMEMLOCK=infinity in systemd, or --ulimit memlock=-1 for a container"


def lock_memory(status: Path = STATUS) -> None:
    """Lock what this process has and will have, each page once it is touched, for the rest of its life.

    Raises OptionError, with what to set, where the system does not allow it. A limit is refused even if it would do for
    now: with memory locked, a request for more than the limit would fail at any later moment.
    """
    if sys.platform != "linux":
        raise _refused("locking memory is done on Linux alone", "leave it out")
    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if most == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))
    elif not may_lock_all(status):
        raise _refused(f"this process may lock {most >> 10} KiB of memory, and not all that it needs", f"set {RAISE}")
    library = ctypes.CDLL(None, use_errno=True)
    if library.mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT):
        why = os.strerror(ctypes.get_errno())
        raise _refused(f"the memory of this process could not be locked ({why})", f"set {RAISE}")


def memory_is_locked(mappings: Path = MAPPINGS) -> bool:
    """Whether memory that this process takes from now on is locked: what Linux says of a page taken for that."""
    if sys.platform != "linux":
        return False
    with mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        held = ctypes.c_char.from_buffer(page)
        flags = mapping_flags(ctypes.addressof(held), mappings)
        del held  # a page that is looked at cannot be given back
    return "lo" in flags


def mapping_flags(address: int, mappings: Path = MAPPINGS) -> set[str]:
    """Linux's flags of the memory at an address, as in /proc/PID/smaps: ``lo`` locked, ``dd`` in no dump, ``wf`` wiped
    in a forked process. Empty where that is not told."""
    inside = False
    try:
        lines = mappings.read_text().splitlines()
    except OSError:
        return set()
    for line in lines:
        first, _, rest = line.partition(" ")
        if first == "VmFlags:" and inside:
            return set(rest.split())
        start, dash, end = first.partition("-")
        if dash and not first.endswith(":"):
            inside = int(start, 16) <= address < int(end, 16)
    return set()


def swap_bytes(swaps: Path = SWAPS) -> int | None:
    """How much swap is on; None where that is not told."""
    try:
        lines = swaps.read_text().splitlines()[1:]
        return sum(int(line.split()[2]) << 10 for line in lines if line.strip())
    except (OSError, ValueError, IndexError):
        return None


def may_lock_all(status: Path = STATUS) -> bool:
    """Whether this process may lock any amount of memory."""
    if sys.platform != "linux":
        return False
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[1] == resource.RLIM_INFINITY:
        return True
    try:
        words = next(line.split() for line in status.read_text().splitlines() if line.startswith("CapEff:"))
        return bool(int(words[1], 16) >> CAP_IPC_LOCK & 1)
    except (OSError, StopIteration, ValueError, IndexError):
        return False


def swap_state(swaps: Path = SWAPS, status: Path = STATUS) -> tuple[bool, str]:
    """For ``tsqp doctor``: whether nothing of a process here can be swapped out without being asked, and one line."""
    on = swap_bytes(swaps)
    swap = "swap: unknown" if on is None else f"swap: {on / 1e9:.1f} GB is on" if on else "swap: none"
    locks = "--lock-memory is allowed" if may_lock_all(status) else f"--lock-memory is not allowed: {RAISE}"
    return on == 0, f"{swap}; {locks}"


def _refused(why: str, hint: str) -> OptionError:
    return OptionError(why, hint=hint, fields=("compute.lock_memory",))
