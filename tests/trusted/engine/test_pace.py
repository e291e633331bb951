"""How many rows of prompts a step has beside answers: what was measured decides, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp.errors import OptionError
from tsqp.trusted.engine.limits import Limits
from tsqp.trusted.engine.pace import GREATEST_FACTOR, LEAST_ROWS, MEASURE_AGAIN, MEASURED, PrefillPace

MOST = 2048


def learnt(pace: PrefillPace, seconds: Callable[[int, int], float], *, answers: int = 4, steps: int = 40) -> list[int]:
    """The rows of steps that take ``seconds`` of answers and rows."""
    found = []
    for _ in range(steps):
        found.append(pace.rows(answers))
        pace.measured(answers, found[-1], seconds(answers, found[-1]))
    return found


def test_the_first_step_beside_answers_is_one_without_rows_of_prompts() -> None:
    pace = PrefillPace(2.0, MOST)
    pace.measured(0, 500, 1.0)  # nobody's answer
    assert pace.rows(3) == 0
    pace.measured(3, 0, 1.0)
    assert pace.rows(3) == LEAST_ROWS


@given(
    alone=st.floats(0.01, 1.0),
    more=st.floats(0.0, 0.3),
    row=st.floats(0.0001, 0.002),
    slowdown=st.floats(1.5, 4.0),
)
def test_a_step_takes_what_it_may(alone: float, more: float, row: float, slowdown: float) -> None:
    """Steps with rows may be slower from the first row on, as those of answers alone can be one compiled loop."""
    pace = PrefillPace(slowdown, MOST)
    found = learnt(pace, lambda _, rows: alone + (more * alone + row * rows if rows else 0))
    allowed = (slowdown - 1 - more) * alone / row
    wanted = min(max(allowed, LEAST_ROWS), MOST)
    for rows in [rows for rows in found[-10:] if rows]:
        assert 0.85 * wanted - 1 <= rows <= 1.15 * wanted + 1


def test_it_grows_by_steps_and_shrinks_at_once_by_half() -> None:
    pace = PrefillPace(2.0, MOST)
    pace.measured(1, 0, 1.0)
    rows = [pace.rows(1)]
    for _ in range(4):
        pace.measured(1, rows[-1], 1.0)
        rows.append(pace.rows(1))
    assert rows == [int(LEAST_ROWS * GREATEST_FACTOR**n) for n in range(5)]
    pace.measured(1, rows[-1], 100.0)
    assert pace.rows(1) == rows[-1] // 2


@given(st.lists(st.tuples(st.integers(0, 64), st.integers(0, 300), st.floats(0, 10)), max_size=60), st.integers(1, 100))
def test_it_stays_within_its_bounds(steps: list[tuple[int, int, float]], most: int) -> None:
    pace = PrefillPace(2.0, most)
    for answers, rows, seconds in steps:
        pace.measured(answers, rows, seconds)
        for company in (1, 16, 64):
            assert pace.rows(company) == 0 or min(LEAST_ROWS, most) <= pace.rows(company) <= most


def test_the_end_of_a_prompt_does_not_make_it_smaller() -> None:
    pace = PrefillPace(2.0, MOST)
    learnt(pace, lambda _, rows: 1.0 + rows / 100)
    before = pace.rows(4)
    pace.measured(4, 2, 1.02)
    assert pace.rows(4) == before > 80


def test_a_step_that_others_have_held_up_is_no_measure() -> None:
    pace = PrefillPace(2.0, MOST)
    for seconds in [1.0] * MEASURED + [60.0]:
        pace.measured(4, 0, seconds)
    found = learnt(pace, lambda _, rows: 1.0 + rows / 100, steps=20)
    assert 95 <= found[-1] <= 105


def test_what_is_old_is_measured_again() -> None:
    """Answers grow: the time of a step alone is not that of a minute ago."""
    pace = PrefillPace(2.0, MOST)
    found = learnt(pace, lambda _, rows: 1.0 + rows / 100, steps=3 * MEASURE_AGAIN)  # 64 steps between two
    assert [at for at, rows in enumerate(found) if rows == 0] == [0, MEASURE_AGAIN + 1, 2 * (MEASURE_AGAIN + 1)]


def test_companies_of_another_size_are_measured_of_their_own() -> None:
    pace = PrefillPace(2.0, MOST)
    learnt(pace, lambda _, rows: 1.0 + rows / 100, answers=1)
    assert pace.rows(2) == 0
    pace.measured(2, 0, 4.0)
    assert pace.rows(3) > 0, "3 is about as many as 2"
    found = learnt(pace, lambda _, rows: 4.0 + rows / 100, answers=3)
    assert 380 <= found[-1] <= 420


@pytest.mark.parametrize("slowdown", [1.0, 0.0, float("nan"), float("inf")])
def test_a_slowdown_that_allows_nothing_is_refused(slowdown: float) -> None:
    with pytest.raises(OptionError, match="slowdown"):
        Limits(slowdown=slowdown)
