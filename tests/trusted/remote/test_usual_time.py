"""When a call takes longer than calls of its kind do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp.trusted.remote.usual_time import ENOUGH, FIRST_S, KEPT, LEAST_S, MOST_S, UsualTime


def after(*seconds: float) -> float:
    usual = UsualTime()
    for one in seconds:
        usual.add("o", one)
    usual.add("another kind", 1000.0)
    return usual.patience_s(["o", "never asked"])


def test_it_is_three_times_the_median() -> None:
    assert after(*[0.1] * ENOUGH) == pytest.approx(0.3)
    assert after(0.1, 0.1, 0.1, 9.0, 9.0) == pytest.approx(0.3)  # a few that stall change nothing


def test_a_few_calls_say_nothing() -> None:
    assert after() == after(*[0.1] * (ENOUGH - 1)) == FIRST_S


def test_it_is_bounded_on_both_sides() -> None:
    assert after(*[1e-6] * ENOUGH) == LEAST_S
    assert after(*[60.0] * ENOUGH) == MOST_S


def test_what_was_long_ago_is_forgotten() -> None:
    assert after(*[0.1] * KEPT, *[0.2] * KEPT) == pytest.approx(0.6)


@given(st.permutations([0.1, 0.2, 5.0]))
def test_the_quickest_says_what_is_usual(seconds: list[float]) -> None:
    usual = UsualTime()
    for member, one in enumerate(seconds):
        for _ in range(ENOUGH):
            usual.add(member, one)
    assert usual.patience_s(range(3)) == pytest.approx(0.3)
    assert [usual.median_s(member) for member in range(4)] == [*seconds, None]


def test_a_few_calls_have_no_median() -> None:
    usual = UsualTime()
    for _ in range(ENOUGH - 1):
        usual.add("o", 0.1)
    assert usual.median_s("o") is None
