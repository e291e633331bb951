"""Bounds that would let nobody in, or hold somebody up for ever, are refused."""

from __future__ import annotations

from typing import Any

import pytest

from tsqp.errors import OptionError
from tsqp.trusted.engine.limits import Limits


@pytest.mark.parametrize("name", ["running", "waiting", "prefill_rows", "idle_rows"])
def test_numbers_are_at_least_one(name: str) -> None:
    least: dict[str, Any] = {name: 1}
    assert getattr(Limits(**least), name) == 1
    wrong: dict[str, Any] = {name: 0}
    with pytest.raises(OptionError, match=name):
        Limits(**wrong)


@pytest.mark.parametrize("slowdown", [1.0, 0.0, float("inf"), float("nan")])
def test_a_slowdown_is_above_one_and_finite(slowdown: float) -> None:
    with pytest.raises(OptionError, match="slowdown"):
        Limits(slowdown=slowdown)
