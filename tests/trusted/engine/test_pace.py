"""How many rows of prompts a step has beside answers: what was measured decides, and nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp.errors import OptionError
from tsqp.trusted.engine.limits import Limits
from tsqp.trusted.engine.pace import HELD_UP_S, LEAST_ROWS, MEASURE_AGAIN, MEASURED, NOTCH, TRY_AGAIN, PrefillPace

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
    wanted = min(max((slowdown - 1 - more) * alone / row, LEAST_ROWS), MOST)
    (often,) = statistics.multimode(found[-15:])
    assert wanted - 2 * NOTCH < often <= wanted + 0.01
    assert max(found[-15:]) <= 1.25 * wanted + NOTCH, "what is tried is not much more"


def test_it_grows_by_half() -> None:
    pace = PrefillPace(2.0, MOST)
    assert learnt(pace, lambda *_: 1.0, steps=9) == [0, 6, 12, 18, 24, 36, 54, 78, 114]


@pytest.mark.parametrize("cliff", [6, 12, 20, 100])
def test_it_stays_below_a_cliff_and_tries_it_seldom(cliff: int) -> None:
    """Where a few more rows take another way, and three times as long."""
    pace = PrefillPace(2.0, MOST)
    found = learnt(pace, lambda _, rows: 1.0 + rows / 200 + 3 * (rows > cliff), steps=300)
    assert statistics.mode(found) == cliff // NOTCH * NOTCH
    assert sum(rows > cliff for rows in found) < 0.05 * len(found)
    assert sum(rows > cliff for rows in found[-3 * MEASURE_AGAIN :]) in (2, 3)


def test_what_was_too_many_is_tried_again() -> None:
    """Others that took the cores may have gone."""
    pace = PrefillPace(2.0, MOST)
    learnt(pace, lambda _, rows: 1.0 + rows / 10)
    found = learnt(pace, lambda _, rows: 1.0 + rows / 100, steps=2 * MEASURE_AGAIN)
    assert found[-1] == 96


def test_a_number_that_was_tried_gives_way_at_once_to_the_one_before() -> None:
    pace = PrefillPace(2.0, MOST)
    learnt(pace, lambda _, rows: 1.0 + rows / 100, steps=5)
    assert pace.rows(4) == 36
    pace.measured(4, 36, 60.0)
    found = learnt(pace, lambda _, rows: 1.0 + rows / 100, steps=TRY_AGAIN)
    assert found[:2] == [24, 30], "half of the way to it"
    assert set(found[1:]) == {30}
    assert pace.rows(4) == 36


def test_one_slow_step_of_a_good_number_changes_nothing_and_two_do() -> None:
    pace = PrefillPace(2.0, 96)
    learnt(pace, lambda *_: 1.0)
    for seconds, rows in ((60.0, 96), (1.5, 96), (60.0, 96), (60.0, 48)):
        pace.measured(4, 96, seconds)
        assert pace.rows(4) == rows


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
    assert pace.rows(4) == before == 96


def test_prompts_that_joined_whole_say_nothing_of_the_pace() -> None:
    pace = PrefillPace(2.0, MOST)
    learnt(pace, lambda _, rows: 1.0 + rows / 100)
    pace.measured(4, 500, 6.0)
    pace.measured(4, 500, 6.0)
    assert pace.rows(4) == 96


def test_a_step_that_others_have_held_up_is_no_measure() -> None:
    pace = PrefillPace(2.0, MOST)
    for seconds in [1.0] * MEASURED + [60.0]:
        pace.measured(4, 0, seconds)
    found = learnt(pace, lambda _, rows: 1.0 + rows / 100, steps=20)
    assert found[-1] == 96


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
    assert statistics.mode(found) == 396


@pytest.mark.parametrize("slowdown", [1.0, 0.0, float("nan"), float("inf")])
def test_a_slowdown_that_allows_nothing_is_refused(slowdown: float) -> None:
    with pytest.raises(OptionError, match="slowdown"):
        Limits(slowdown=slowdown)


# Prompts that are done with in one step


Seconds = Callable[[int, int], float]


def device(alone: float, more: float, row: float) -> Seconds:
    """Steps of answers, whose number does not matter, with or without rows of prompts."""
    return lambda answers, rows: alone * bool(answers) + (more + row * rows) * bool(rows)


def knowing(seconds: Seconds, *, answers: int, rows: int) -> PrefillPace:
    """Who has seen steps of answers alone, with the least rows, and of ``rows`` with and without answers."""
    pace = PrefillPace(2.0, MOST)
    for company, prompts in (
        (0, rows),
        (answers, 0),
        (answers, LEAST_ROWS),
        (answers, 2 * LEAST_ROWS),
        (answers, rows),
    ):
        pace.measured(company, prompts, seconds(company, prompts))
    return pace


def waited(seconds: Seconds, parts: list[int], *, answers: int, prompts: int) -> float:
    """How much later all are, taken together, for steps that have these parts of prompts."""
    steps = [seconds(answers, rows) for rows in parts]
    return answers * (sum(steps) - len(steps) * seconds(answers, 0)) + prompts * sum(steps)


@given(
    alone=st.floats(0.01, 0.1),
    more=st.floats(0.0, 0.2),
    row=st.floats(0.0001, 0.005),
    answers=st.integers(1, 32),
    prompts=st.integers(1, 32),
    rows=st.integers(16, 31),
)
def test_all_wait_least(alone: float, more: float, row: float, answers: int, prompts: int, rows: int) -> None:
    seconds = device(alone, more, row)
    pace = knowing(seconds, answers=answers, rows=rows)
    number = min(pace.rows(answers), rows)
    in_turns = waited(seconds, -(-rows // number) * [number], answers=answers, prompts=prompts)
    at_once = waited(seconds, [rows], answers=answers, prompts=prompts)
    found = pace.at_once(answers, rows, prompts)
    assert found in (0, rows)
    if abs(at_once - in_turns) > 1e-6 * in_turns:
        assert bool(found) == (at_once < in_turns)


def test_a_burst_beside_one_answer_is_taken_at_once_and_one_prompt_beside_eight_is_not() -> None:
    """Measured of the default model, masked: rows of prompts that are few go into a loop that costs little."""
    times = {(0, 32): 0.17, (0, 160): 0.5, (1, 0): 0.02, (1, 6): 0.043, (8, 0): 0.052, (8, 6): 0.055, (8, 32): 0.194}
    pace = PrefillPace(1.01, MOST)  # so that the number stays as it is
    for (answers, rows), seconds in times.items():
        pace.measured(answers, rows, seconds)
    assert pace.at_once(1, 150, 5) == 150
    assert pace.at_once(8, 32, 1) == 0


@pytest.mark.parametrize("unknown", ["alone", "with the pace's rows", "with more"])
def test_nothing_is_done_at_once_before_it_was_measured_what_it_saves(unknown: str) -> None:
    pace = PrefillPace(2.0, MOST)
    if unknown != "with more":
        pace.measured(0, 32, 0.1)
    if unknown != "alone":
        pace.measured(8, 0, 0.05)
    if unknown == "with more":
        pace.measured(8, LEAST_ROWS, 2 * HELD_UP_S)
    assert pace.at_once(8, 32, 4) == 0


@given(rows=st.integers(32, 5000), row=st.floats(0.0005, 0.1))
def test_nobody_is_held_up_for_longer_than_the_bound(rows: int, row: float) -> None:
    seconds = device(0.02, 0.1, row)
    found = knowing(seconds, answers=2, rows=64).at_once(2, rows, 20)
    assert found <= min(rows, MOST)
    assert not found or seconds(2, found) - seconds(2, 0) <= HELD_UP_S + 1e-9


def test_of_prompts_that_would_take_too_long_as_many_are_taken_as_the_bound_allows() -> None:
    pace = knowing(device(0.02, 0.1, 0.001), answers=2, rows=1024)
    assert pace.at_once(2, 1024, 8) == 400
