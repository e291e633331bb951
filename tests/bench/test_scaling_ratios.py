"""What one choice gives over another, from plans made up here."""

from __future__ import annotations

from typing import Any

from benchmarks import scaling_ratios
from benchmarks.scaling_ratios import LINK, MODELS, PLAIN, WORKERS, Plans, follows

from tsqp.plan.cluster import Link
from tsqp.plan.constants import load


class FakePlans(Plans):
    """A rate is the model's place times the workers, ten times as high without keys; a GPU has no room for 405B."""

    def _plan(self, model: str, workers: int, link: Link, batch: int, device: str, cores: int) -> dict[str, Any] | None:
        if (model, device) == ("405b", "h200"):
            return None
        rate = (MODELS.index(model) + 1) * workers * (10 if link == PLAIN else 1)
        return {
            "decode": {"tokens_per_s": rate * batch, "gain": 32 / cores * batch / 16},
            "prefill": {"tokens_per_s": rate**2, "gain": 1.5},
        }


def rows(plans: Plans) -> dict[str, list[str]]:
    found = (line.strip("|").split("|") for line in follows(plans) if line.startswith("|"))
    return {title.strip(): [cell.strip() for cell in cells] for title, *cells in found}


def test_ratios_are_of_the_same_model_from_the_least_to_the_most() -> None:
    found = rows(FakePlans(load()))
    assert found["without keys, to with keys"] == ["10, 10, 100"] * 2
    assert found["8 workers, to 1"] == ["8, 8, 64"] * 2
    assert found["1,024 workers, to 64"] == ["16, 16, 256"] * 2


def test_gains_are_bold_where_the_split_is_faster() -> None:
    found = rows(FakePlans(load()))
    assert found["70B, 32 trusted cores"] == ["0.062, 1, **1.5**"] * 4
    assert found["70B, 4 trusted cores"] == ["0.5, **8**, **1.5**"] * 4
    assert found["405B, 4 trusted cores"] == ["0.5, **8**, **1.5**"] * 2 + ["does not fit"] * 2


def test_a_spread_is_one_number_where_all_are_the_same() -> None:
    assert scaling_ratios._spread([1.0, 1.001]) == "1"
    assert scaling_ratios._spread([2.0, 0.5, 1.0]) == "0.5–2"
    assert scaling_ratios._spread([]) == "none fits"


def test_each_plan_is_made_once() -> None:
    made: list[tuple[object, ...]] = []

    class Counted(FakePlans):
        def _plan(self, *asked: Any) -> dict[str, Any] | None:
            made.append(asked)
            return super()._plan(*asked)

    plans = Counted(load())
    for _ in range(2):
        plans.rates("8b", WORKERS[0], LINK, "cpu")
        assert plans.rates("405b", WORKERS[0], LINK, "h200") is None
    assert len(made) == len(set(made)) == 3  # prefill is the plan of 16 sequences
