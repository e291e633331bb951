"""Parts of a chunk are as many as was asked for, or as the first long chunks show."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp.trusted.engine.micro_batches import LEAST_ROWS, ROUNDS, TRIED, WORTH, Fixed, Measured, micro_batches

ALL_TRIED = ROUNDS * len(TRIED)


def run(measured: Measured, cost: dict[int, float], chunks: int, rows: int = LEAST_ROWS) -> list[int]:
    """Chunks one after another, each of which takes what ``cost`` says of a row in so many parts."""
    taken = []
    for _ in range(chunks):
        taken.append(measured.parts(rows))
        measured.took(rows, taken[-1], cost[taken[-1]] * rows)
    return taken


@given(st.fixed_dictionaries({count: st.floats(0.1, 10.0) for count in TRIED}))
def test_the_fastest_is_kept_where_it_is_worth_it(cost: dict[int, float]) -> None:
    measured = Measured()
    tried = run(measured, cost, ALL_TRIED)
    assert sorted(tried) == sorted(TRIED * ROUNDS)
    fastest = min(TRIED, key=lambda count: cost[count])
    (kept,) = set(run(measured, dict.fromkeys(TRIED, 1.0), 2 * ALL_TRIED))
    if cost[fastest] < 0.99 * WORTH * cost[1]:
        assert kept == fastest
    elif cost[fastest] > 1.01 * WORTH * cost[1]:
        assert kept == 1


def test_the_first_of_each_does_not_count() -> None:
    """It compiles, captures and makes pads: here that of one part alone was quick, by luck."""
    measured = Measured()
    run(measured, {1: 0.01, 2: 9.0, 4: 9.0}, len(TRIED))
    run(measured, {1: 3.0, 2: 1.0, 4: 2.0}, ALL_TRIED)
    assert measured.parts(LEAST_ROWS) == 2


def test_chunks_of_different_sizes_are_compared_by_the_row() -> None:
    measured = Measured()
    for turn in range(ALL_TRIED):
        rows = LEAST_ROWS * (1 + turn % 3)
        count = measured.parts(rows)
        measured.took(rows, count, rows * {1: 2.0, 2: 3.0, 4: 1.0}[count])
    assert measured.parts(LEAST_ROWS) == 4


def test_few_rows_are_one_part_and_say_nothing() -> None:
    measured = Measured()
    assert run(measured, dict.fromkeys(TRIED, 1.0), 100, rows=LEAST_ROWS - 1) == [1] * 100
    assert sorted(run(measured, {1: 2.0, 2: 1.0, 4: 2.0}, ALL_TRIED)) == sorted(TRIED * ROUNDS)
    assert measured.parts(LEAST_ROWS) == 2
    assert measured.parts(LEAST_ROWS - 1) == 1


@pytest.mark.parametrize(("asked", "device", "parts"), [(3, "cpu", 3), (3, "cuda:0", 3), (None, "cpu", 1)])
def test_what_is_asked_for_is_done_and_beside_a_cpu_it_is_one(asked: int | None, device: str, parts: int) -> None:
    found = micro_batches(asked, device)
    assert isinstance(found, Fixed)
    assert found.parts(1) == found.parts(5000) == parts


def test_beside_a_device_it_is_measured() -> None:
    assert isinstance(micro_batches(None, "cuda:1"), Measured)
