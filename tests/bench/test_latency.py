"""Figures of answers: percentiles, throughput, and latencies from the intended moment."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp.bench.latency import Answer, figures, percentile, rate_together, tokens_between
from tsqp.errors import WorkerFailed

VALUES = st.lists(st.floats(0, 1e6), min_size=1, max_size=60)


@given(VALUES, st.integers(1, 100))
def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed(values: list[float], hundredths: int) -> None:
    found = percentile(values, hundredths / 100)
    assert found in values
    assert 100 * sum(value <= found for value in values) >= hundredths * len(values)
    assert 100 * sum(value < found for value in values) < hundredths * len(values)


def test_percentiles_of_known_lists() -> None:
    assert percentile([5.0, 1.0, 3.0], 0.5) == 3.0
    assert percentile([float(n) for n in range(100, 0, -1)], 0.95) == 95.0
    assert percentile([7.0], 0.95) == 7.0


def test_times_of_an_answer_count_from_the_moment_it_was_meant_for() -> None:
    answer = Answer(asked_s=10.0, arrived_s=(10.5, 10.75, 12.0), tokens=4)
    assert (answer.first_s, answer.whole_s, answer.token_s) == (0.5, 2.0, 0.5)


def test_an_answer_of_one_token_has_no_time_between_tokens() -> None:
    assert Answer(1.0, arrived_s=(2.0,), tokens=1).token_s == 0


def test_tokens_of_the_time_alone_are_counted() -> None:
    inside, half = Answer(0.0, arrived_s=(1.0, 2.0), tokens=6), Answer(0.0, arrived_s=(2.0, 4.0), tokens=6)
    assert tokens_between([inside, half], 0.5, 3.0) == 6 + 3
    assert tokens_between([inside, half], 1.0, 3.0) == 3 + 3  # what is there when it begins does not come in it
    assert tokens_between([inside, half], 1.5, 4.0) == 3 + 6


def test_a_rate_of_all_is_of_the_time_in_which_all_go_on() -> None:
    """The second one has its first token late, beside its prompt; the first one has ended before it."""
    early = Answer(0.0, arrived_s=(0.0, 0.5, 2.0, 2.25, 2.5, 2.75), tokens=6)
    late = Answer(0.0, arrived_s=(2.0, 2.25, 2.5, 2.75, 3.0, 3.25), tokens=6)
    assert rate_together([early, late]) == (3 + 3) / 0.75
    assert rate_together([late]) == 5 / 1.25


def test_answers_that_never_go_on_together_have_no_rate() -> None:
    first, second = Answer(0.0, arrived_s=(1.0, 2.0), tokens=2), Answer(0.0, arrived_s=(2.0, 3.0), tokens=2)
    with pytest.raises(WorkerFailed, match="more --steps"):
        rate_together([first, second])


def test_figures_of_a_run() -> None:
    answers = [Answer(0.0, 200, (1.0, 2.0), 3), Answer(1.0, 200, (4.0, 8.0), 5), Answer(2.0, 429), Answer(2.0, 503)]
    found = figures(answers, 0.0, 4.0)
    assert (found["answers"], found["refused"], found["seconds"]) == (2, 2, 4.0)
    assert found["tokens_per_s"] == (3 + 2.5) / 4
    assert found["first"] == {"p50_s": 1.0, "p95_s": 3.0}
    assert found["token"] == {"p50_s": 0.5, "p95_s": 1.0}
    assert found["whole"] == {"p50_s": 2.0, "p95_s": 7.0}


def test_where_all_were_refused_there_is_no_latency() -> None:
    found = figures([Answer(0.0, 429)], 0.0, 1.0)
    assert (found["answers"], found["refused"], found["tokens_per_s"], found["first"]) == (0, 1, 0.0, None)


def test_nothing_is_counted_twice_at_any_cut() -> None:
    answers = [Answer(0.0, arrived_s=tuple(k / 8 for k in range(1, 9)), tokens=16)]
    before, after = tokens_between(answers, 0.0, 0.5), tokens_between(answers, 0.5, 1.0)
    assert before + after == pytest.approx(16)
