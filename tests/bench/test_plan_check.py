"""What is foretold stands beside what was measured for the same work."""

from __future__ import annotations

import pytest
from benchmarks.plan_check import products_s, row

from tests.plan.numbers import constants, model
from tsqp.plan.cluster import Team
from tsqp.plan.constants import ProductTimes


def test_workers_that_share_the_cores_multiply_as_long_as_one() -> None:
    worker = ProductTimes(call_s=10.0, weight_s=1.0, few_s=1.0, many_s=2.0, number_s=3.0)
    alone, apart, together = (
        model(constants(worker), team, cores=2) for team in (Team(), Team(columns=4), Team(layers=2))
    )
    for batch in (1, 0):
        parts = alone.decode() if batch else alone.prefill()
        assert products_s(alone, batch) == products_s(together, batch) == parts.worker
        assert products_s(apart, batch) == parts.worker + parts.launches  # four calls on two cores
    assert apart.decode().worker < alone.decode().worker  # of machines of their own


@pytest.mark.parametrize(("measured", "near"), [(0.79, False), (0.81, True), (1.24, True), (1.26, False)])
def test_a_prediction_is_near_within_a_quarter(measured: float, near: bool) -> None:
    found = row("a case", "the whole", 1.0, measured)
    assert found["ratio"] == measured
    assert found["near"] == near
