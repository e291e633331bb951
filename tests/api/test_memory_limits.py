"""What limits on addresses and on memory leave to a process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tsqp.api import memory_limits
from tsqp.api.memory_limits import available_bytes, limits_left

MIB = 1 << 20
VERSION_2 = "0::/a/b"
VERSION_1 = "12:cpu,cpuacct:/a\n4:hugetlb,memory:/a/b\n1:name=systemd:/a\n0::/c"


@pytest.mark.parametrize("place", ["/a/b", "/a", ""])
@pytest.mark.parametrize(
    ("groups", "root", "file"),
    [
        (VERSION_2, "/sys/fs/cgroup", "memory.max"),
        (VERSION_1, "/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
    ],
    ids=["version 2", "version 1"],
)
def test_the_limit_of_a_group_and_of_those_above_it(
    limits: dict[str, str], groups: str, root: str, file: str, place: str
) -> None:
    limits |= {"/proc/self/cgroup": groups, f"{root}{place}/{file}": str(1000 * MIB)}
    assert list(limits_left(None)) == [1000 * MIB]


@pytest.mark.parametrize(
    ("groups", "root", "files"),
    [
        (VERSION_2, "/sys/fs/cgroup", ("memory.max", "memory.current", "")),
        (
            VERSION_1,
            "/sys/fs/cgroup/memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_what_a_group_has_used_is_not_left_but_pages_of_files_are(
    limits: dict[str, str], groups: str, root: str, files: tuple[str, str, str]
) -> None:
    limit, used, total = files
    limits |= {
        "/proc/self/cgroup": groups,
        f"{root}/a/b/{limit}": str(1000 * MIB),
        f"{root}/a/{limit}": str(3000 * MIB),
    }
    limits |= {f"{root}/a/b/{used}": f"{700 * MIB}\n", f"{root}/a/{used}": str(2900 * MIB)}
    assert list(limits_left(None)) == [300 * MIB, 100 * MIB]
    limits[f"{root}/a/b/memory.stat"] = (
        f"anon 5\n{total}inactive_file_of_others 9\n{total}inactive_file {200 * MIB}\n"
        f"{total}active_file {150 * MIB}\n{total}unevictable 7\n"
    )
    assert list(limits_left(None)) == [650 * MIB, 100 * MIB]
    assert available_bytes() == 100 * MIB
    limits[f"{root}/a/{used}"] = str(3100 * MIB)  # as where a limit was made smaller
    assert available_bytes() == 0


def test_a_group_without_a_limit(limits: dict[str, str]) -> None:
    limits["/sys/fs/cgroup/a/memory.max"] = "max"
    assert list(limits_left(None)) == []


def test_other_controllers_have_no_limit_of_memory(limits: dict[str, str]) -> None:
    limits |= {"/proc/self/cgroup": "4:cpu:/a", "/sys/fs/cgroup/memory/a/memory.limit_in_bytes": "5"}
    assert list(limits_left(None)) == []


@pytest.mark.parametrize(
    ("free", "group", "expected"),
    [(8, None, 8), (8, 2, 2), (2, 8, 2), (None, 2, 2), (None, None, None)],
)
def test_what_is_available_is_the_least(
    limits: dict[str, str], free: int | None, group: int | None, expected: int | None
) -> None:
    if free is not None:
        limits["/proc/meminfo"] = f"MemTotal: 1 kB\nMemAvailable:   {free * MIB // 1024} kB\n"
    if group is not None:
        limits["/sys/fs/cgroup/a/memory.max"] = str(group * MIB)
    assert available_bytes() == (None if expected is None else expected * MIB)


def test_a_limit_that_is_passed_leaves_nothing(limits: dict[str, str]) -> None:
    limits["limit"] = str(1000 * MIB)
    assert available_bytes() == 0


def test_what_this_process_has_mapped_is_read() -> None:
    assert memory_limits._mapped_bytes("self") > 10 * MIB
    assert memory_limits._mapped_bytes(os.getpid()) > 10 * MIB
    assert memory_limits._lines(Path("/nowhere")) == []
