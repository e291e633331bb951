"""Workers on this machine that a roster names: what each holds, and how many threads it has."""

from __future__ import annotations

import pytest

from tsqp.bench import teams
from tsqp.bench.teams import shards_of, threads_of
from tsqp.checkpoint.synthetic import SHAPES
from tsqp.config.shard import Shard, check_tiling
from tsqp.plan.cluster import Team

CONFIG = SHAPES["tiny"]


@pytest.mark.parametrize("team", [Team(), Team(columns=3), Team(layers=2), Team(2, 3, 2)], ids=str)
def test_the_workers_of_a_team_hold_the_model_as_often_as_it_has_replicas(team: Team) -> None:
    shards = shards_of(CONFIG, team)
    assert len(shards) == team.workers
    distinct = check_tiling([Shard.parse(text) for text in shards], CONFIG)
    assert all(shards.count(str(shard)) == team.replicas for shard in distinct)
    assert len({(shard.first, shard.end) for shard in distinct}) == team.layers


@pytest.mark.parametrize(("cores", "columns", "threads"), [(8, 1, 8), (8, 2, 4), (8, 3, 2), (2, 4, 1)])
def test_workers_that_compute_at_once_share_the_cores(
    cores: int, columns: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teams, "cores", lambda: cores)
    assert threads_of(columns) == threads
