"""How Ray is asked, on modules that stand for it: how long room is waited for, and what its errors become."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.cluster.fake_pool import STARTED
from tsqp.cluster.pool import RayPool
from tsqp.cluster.state import ClusterDirectory, Group, Record
from tsqp.errors import ClusterError

GROUPS = (Group("tsqp-a-0", (0, 1)),)


class RayError(Exception):
    """What Ray's errors have in common."""


class FakeRay(ModuleType):
    """Ray with no actor, no placement group and no room."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.waited_s: list[float] = []
        self.broken: Exception = RayError()
        strategies = dict.fromkeys(("NodeAffinitySchedulingStrategy", "PlacementGroupSchedulingStrategy"), object)
        self.strategies = _module("ray.util.scheduling_strategies", **strategies)
        self.exceptions = _module("ray.exceptions", RayError=RayError)
        self.util = _module("ray.util", get_placement_group=_not_there, placement_group=lambda *_, **__: self)
        self.get_runtime_context = self.kill = self.util.remove_placement_group = self.get_actor

    def wait(self, timeout_seconds: float) -> bool:
        """As a placement group that is not ready."""
        self.waited_s.append(timeout_seconds)
        return False

    def get_actor(self, *_: object, **__: object) -> Any:
        """As where nobody answers any more."""
        raise self.broken


def _module(name: str, **names: object) -> Any:
    made = ModuleType(name)
    vars(made).update(names)
    return made


def _not_there(name: str) -> None:
    raise ValueError(f"{name} is not there")


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    made = FakeRay()
    for module in (made, made.util, made.exceptions, made.strategies):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


def pool(directory: Path, *, own: bool = False) -> RayPool:
    record = Record(2, "a", "here", "tsqp-a-0", "10.0.0.1:6379", own, "", "/t", "", STARTED, ("0..3",), 2, GROUPS)
    return RayPool(ClusterDirectory("a", directory / "a"), record)


@pytest.mark.parametrize(("own", "timeout_s", "most_s"), [(False, 600.0, 600.0), (True, 600.0, 30.0), (True, 9.0, 9.0)])
def test_room_is_waited_for_as_long_as_the_user_said_where_nodes_may_join(
    own: bool, timeout_s: float, most_s: float, ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsqp.cluster.pool.time", SimpleNamespace(monotonic=lambda: 1000.0))
    with pytest.raises(ClusterError, match="no room for 2 workers more, of 1 CPU each: none came in"):
        pool(tmp_path, own=own).place(GROUPS, {0: "0..3", 1: "0..3"}, timeout_s)
    assert ray.waited_s == [most_s]


@pytest.mark.parametrize(
    "call",
    [
        lambda pool: pool.open_registry(),
        lambda pool: pool.reload(),
        lambda pool: pool.view(),
        lambda pool: pool.place(GROUPS, {0: "0..3"}, 1.0),
        lambda pool: pool.end((0,)),
        lambda pool: pool.remove_groups(GROUPS),
        lambda pool: pool.close_registry(),
    ],
)
@pytest.mark.parametrize("kind", [RayError, RuntimeError, OSError])
def test_what_ray_raises_is_a_cluster_error_of_one_line(
    call: Callable[[RayPool], object], kind: type[Exception], ray: FakeRay, tmp_path: Path
) -> None:
    ray.broken = kind("System error:\nRpcError: the control process is gone\n")
    ray.util.get_placement_group = ray.util.placement_group = ray.get_actor
    with pytest.raises(ClusterError, match=r"^Ray: RpcError: the control process is gone$"):
        call(pool(tmp_path))


def test_an_actor_that_is_not_there_is_not_one_that_could_not_be_ended(ray: FakeRay, tmp_path: Path) -> None:
    ray.broken = ValueError("worker-0 is not there")
    pool(tmp_path).end((0, 1))
    pool(tmp_path).remove_groups(GROUPS)
    pool(tmp_path).close_registry()
    with pytest.raises(ClusterError, match="cluster a has lost its registry: tsqp cluster down, then up"):
        pool(tmp_path).reload()
