"""How long somebody is waited for: an end, or none, and whether it is to stop."""

from __future__ import annotations

import pytest

from tsqp.api.until import Until
from tsqp.errors import ChannelClosed


def test_an_end_comes_and_without_one_the_other_bound_holds() -> None:
    assert not Until().passed
    assert Until().left_s(3.0) == 3.0
    assert not Until(1000.0).passed
    assert 900.0 < Until(1000.0).left_s(3.0) <= 1000.0
    assert Until(0.0).passed
    assert Until(0.0).left_s(3.0) == 0.0


def test_a_shorter_end_counts_and_a_longer_one_does_not() -> None:
    assert Until(1000.0).within(5.0).left_s(1e6) <= 5.0
    assert 900.0 < Until(1000.0).within(1e6).left_s(1e6) <= 1000.0
    assert 4.0 < Until().within(5.0).left_s(1e6) <= 5.0
    assert Until(0.0).within(5.0).passed


def test_it_may_begin_again() -> None:
    assert Until().again().left_s(3.0) == 3.0
    over = Until(1000.0)
    over._deadline = Until(0.0)._deadline
    assert over.passed
    assert not over.again().passed
    assert 900.0 < over.again().left_s(3.0) <= 1000.0


def test_whoever_is_to_stop_hears_of_it_whatever_was_made_of_the_end() -> None:
    stop: list[bool] = []
    until = Until(1000.0, lambda: bool(stop))
    made = [until, until.within(5.0), until.again()]
    for one in made:
        one.raise_if_stopped()
    stop.append(True)
    for one in made:
        with pytest.raises(ChannelClosed, match="the model was closed"):
            one.raise_if_stopped()
