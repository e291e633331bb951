"""How much memory this process may take: what the system has available, and what the limits found leave.

A limit on addresses (``ulimit -v``) counts all that is mapped, touched or not. A limit on memory (a control group's, of
version 2 or 1) counts what is touched, by all processes of the group, and files that are held for who reads them next.
"""

from __future__ import annotations

import resource
from collections.abc import Iterable, Iterator
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
            yield from _left_by_groups(_GROUPS, group, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):  # version 1, whose greatest number stands for no limit
            files = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
            yield from _left_by_groups(_GROUPS / "memory", group, *files)


def _left_by_groups(root: Path, group: str, limit: str, used: str, total: str) -> Iterator[int]:
    """Of a group and of all above it. In a container they may be the root's, whatever the name of the group says.

    ``limit`` and ``used`` are files of a group, ``total`` what lines of its statistics begin with. Pages of files that
    are held for who reads them next can be had, as for the system's own count: what counts as active was read twice.
    """
    held = tuple(f"{total}{kind}_file " for kind in ("inactive", "active"))
    here = root / group.lstrip("/")
    for place in (here, *here.parents):
        for line in _lines(place / limit):
            if line.isdecimal():
                taken = _first_number(_lines(place / used))
                files = (int(one.split()[-1]) for one in _lines(place / "memory.stat") if one.startswith(held))
                yield int(line) - max(0, taken - sum(files))


def _first_number(lines: Iterable[str]) -> int:
    """The number that the first line ends with; 0 where there is none."""
    return int(next((line.split()[-1] for line in lines), "0"))


def _mapped_bytes(process: int | str) -> int:
    """The addresses that a process has mapped."""
    sizes = (line.split()[1] for line in _lines(f"/proc/{process}/status") if line.startswith("VmSize:"))
    return 1024 * int(next(sizes, "0"))


def _lines(path: str | Path) -> list[str]:
    """A file of the system, empty where there is none."""
    with suppress(OSError):
        return Path(path).read_text().splitlines()
    return []
