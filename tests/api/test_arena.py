"""How large the shared memory is, from the limits that are found."""

from __future__ import annotations

import pytest

from tsqp.api.arena import LEAST_BYTES, arena_for, fitting_arena
from tsqp.errors import AddressError

MIB = 1 << 20


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


def test_several_workers_have_together_what_one_would_have(limits: dict[str, str]) -> None:
    limits["/sys/fs/cgroup/a/memory.max"] = str(1000 * MIB)
    assert [fitting_arena(None, sharing) for sharing in (1, 2, 5)] == [500 * MIB, 250 * MIB, 100 * MIB]
    with pytest.raises(AddressError, match=r"leave \d+ bytes to share with each of 50 workers: .*worker\.arena_bytes"):
        fitting_arena(None, 50)


def test_what_was_asked_for_is_for_each_worker(limits: dict[str, str]) -> None:
    limits["/sys/fs/cgroup/a/memory.max"] = str(1000 * MIB)
    assert arena_for("shm:///run/x.sock", 900 * MIB, sharing=4) == 900 * MIB
    assert arena_for("shm:///run/x.sock", sharing=4) == 125 * MIB
    assert arena_for("tcp://127.0.0.1:1", sharing=4) is None


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
