"""How much memory this process may take: what the system has available, and what the limits found leave.

A limit on addresses (``ulimit -v``) counts all that is mapped, touched or not; a limit on memory (a control group's, of
version 2 or 1) counts what is touched.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Memory that can be had without swapping and within the limits; None where the system does not tell."""
    free = (int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:"))
    least = min([*(1024 * size for size in free), *limits_left(None)], default=None)
    return None if least is None else max(0, least)


def limits_left(worker: int | None) -> Iterator[int]:
    """What each limit leaves, to this process and to its worker, which has inherited the limits."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        for process in ("self", worker):
            if process is not None:
                yield limit - _mapped_bytes(process)
    for line in _lines("/proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            yield from _limits_of_groups(_GROUPS, group, "memory.max")
        elif "memory" in controllers.split(","):  # version 1, whose greatest number stands for no limit
            yield from _limits_of_groups(_GROUPS / "memory", group, "memory.limit_in_bytes")


def _limits_of_groups(root: Path, group: str, file: str) -> Iterator[int]:
    """Of a group and of all above it. In a container they may be the root's, whatever the name of the group says."""
    here = root / group.lstrip("/")
    for place in (here, *here.parents):
        yield from (int(line) for line in _lines(place / file) if line.isdecimal())


def _mapped_bytes(process: int | str) -> int:
    """The addresses that a process has mapped."""
    sizes = (line.split()[1] for line in _lines(f"/proc/{process}/status") if line.startswith("VmSize:"))
    return 1024 * int(next(sizes, "0"))


def _lines(path: str | Path) -> list[str]:
    """A file of the system, empty where there is none."""
    with suppress(OSError):
        return Path(path).read_text().splitlines()
    return []
