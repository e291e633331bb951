"""Which wait is the pause that a lost node costs."""

from __future__ import annotations

from benchmarks.cluster import longest_waits


def test_the_pause_is_the_longest_wait_of_any_answer_for_a_token_after_the_loss() -> None:
    """The first answer waits over the loss, the second has its own slow step before, and prefill is no pause."""
    first = [9.0, 10.0, 11.0, 15.0, 16.0]
    second = [1.0, 3.0, 10.5, 12.0, 13.0]
    assert longest_waits([first, second], killed_s=11.5) == (7.5, 4.0)
    assert longest_waits([second, first], killed_s=11.5) == (7.5, 4.0)
