"""How large the shared memory is, from the limits that are found."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from tsqp.api import arena
from tsqp.api.arena import LEAST_BYTES, fitting_arena
from tsqp.errors import AddressError

MIB = 1 << 20


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The files and the limit that are found; this process has mapped 1 GiB."""
    found = {"/proc/self/status": f"VmSize:\t{MIB} kB", "/proc/self/cgroup": "0::/a/b", "limit": "-1"}
    monkeypatch.setattr(arena, "_lines", lambda path: found.get(str(path), "").splitlines())
    monkeypatch.setattr(resource, "getrlimit", lambda _: (int(found["limit"]), -1))
    return found


def test_without_limits_it_is_four_gibibytes(limits: dict[str, str]) -> None:
    assert fitting_arena(None) == 4096 * MIB
    limits["/sys/fs/cgroup/a/memory.max"] = "max"
    assert fitting_arena(7) == 4096 * MIB


def test_half_of_what_is_left_to_this_process(limits: dict[str, str]) -> None:
    limits["limit"] = str(3072 * MIB + 5)
    assert fitting_arena(None) == 1024 * MIB


def test_half_of_what_is_left_to_the_worker(limits: dict[str, str]) -> None:
    limits |= {"limit": str(3072 * MIB), "/proc/7/status": f"Name:\tx\nVmSize:\t{2 * MIB} kB"}
    assert fitting_arena(7) == 512 * MIB


@pytest.mark.parametrize("place", ["/sys/fs/cgroup/a/b", "/sys/fs/cgroup/a", "/sys/fs/cgroup"])
def test_half_of_the_memory_that_the_group_may_use(limits: dict[str, str], place: str) -> None:
    limits[f"{place}/memory.max"] = str(1000 * MIB)
    assert fitting_arena(None) == 500 * MIB


@pytest.mark.parametrize("left", [-5 * MIB, 0, 2 * LEAST_BYTES - 1])
def test_next_to_nothing_is_an_error_that_names_the_option(limits: dict[str, str], left: int) -> None:
    limits["limit"] = str(1024 * MIB + left)
    with pytest.raises(AddressError, match=r"worker\.arena_bytes") as error:
        fitting_arena(None)
    assert error.value.fields == ("worker.arena_bytes",)


def test_what_this_process_has_mapped_is_read() -> None:
    assert arena._mapped_bytes("self") > 10 * MIB
    assert arena._mapped_bytes(os.getpid()) > 10 * MIB
    assert arena._lines(Path("/nowhere")) == []
