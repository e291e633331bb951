"""A cluster begins, changes and ends, on a pool without Ray: what is left after each, and after what fails."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from tests.cluster.fake_pool import FRONT, STARTED, FakePool, SharedRay, joined
from tests.commands import LIMIT_S
from tsqp.cluster import control
from tsqp.cluster.control import down, scale, status, up
from tsqp.cluster.layout import Layout
from tsqp.cluster.processes import MARK
from tsqp.cluster.state import ClusterDirectory, Group, known_clusters, replace_private
from tsqp.errors import ClusterError, OptionError

TWO = Layout(("0..3/0..1of2", "0..3/1..2of2"), 1)


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


@pytest.fixture
def begin(tmp_path: Path) -> Callable[..., FakePool]:
    def make(layout: Layout = TWO, name: str = "a", pool: FakePool | None = None) -> FakePool:
        pool = pool or FakePool()
        up(name, layout, STARTED, joined=joined(tmp_path), machinery=pool.machinery)
        return pool

    return make


def test_up_starts_each_shard_and_status_says_so(begin: Callable[..., FakePool]) -> None:
    pool = begin(TWO.with_replicas(2))
    assert pool.running == {0: TWO.shards[0], 1: TWO.shards[1], 2: TWO.shards[0], 3: TWO.shards[1]}
    assert sorted(pool.groups.values()) == [(0, 2), (1, 3)]
    record, view = status("a", machinery=pool.machinery)
    assert (record.front, record.layout, view.front) == (FRONT, TWO.with_replicas(2), FRONT)


def test_up_ends_when_the_registry_has_heard_of_every_worker(begin: Callable[..., FakePool]) -> None:
    pool = FakePool()
    pool.states = iter(["starting", "starting", "listening"])
    begin(pool=pool)
    assert next(pool.states, None) is None
    assert pool.running


def test_a_worker_that_the_registry_does_not_hear_of_ends_up(
    begin: Callable[..., FakePool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "HEARD_S", 0.0)
    pool = FakePool()
    pool.state = "starting"
    with pytest.raises(ClusterError, match="worker 0, 1 was started, and is not in the roster"):
        begin(pool=pool)
    assert not pool.running


def test_scale_touches_only_what_comes_and_goes(begin: Callable[..., FakePool]) -> None:
    pool = begin()
    pool.events.clear()
    view = scale("a", lambda layout: layout.with_replicas(3), machinery=pool.machinery)
    assert pool.events == ["roster of 6", "start 2", "start 4", "start 3", "start 5"]
    assert len(view.workers) == 6
    pool.events.clear()
    scale("a", lambda layout: layout.with_workers(4), machinery=pool.machinery)
    assert pool.events == ["roster of 4", "end 4", "end 5"]  # out of the roster first
    pool.events.clear()
    scale("a", lambda layout: layout.with_workers(6), machinery=pool.machinery)
    assert pool.events == ["roster of 6", "start 4", "start 5"]  # in the places that they had
    assert len(pool.groups) == 3
    scale("a", lambda layout: layout.with_workers(2), machinery=pool.machinery)
    assert pool.running == {0: TWO.shards[0], 1: TWO.shards[1]}
    assert list(pool.groups.values()) == [(0, 1)]


def test_a_scale_that_fails_is_taken_back(begin: Callable[..., FakePool]) -> None:
    pool = begin()
    pool.fails_at = 3
    with pytest.raises(ClusterError, match="no such model"):
        scale("a", lambda layout: layout.with_replicas(2), machinery=pool.machinery)
    assert pool.running == {0: TWO.shards[0], 1: TWO.shards[1]}
    assert list(pool.groups.values()) == [(0, 1)]
    assert len(pool.known) == 2
    assert status("a", machinery=pool.machinery)[0].layout == TWO
    with pytest.raises(OptionError):
        scale("a", lambda layout: layout.with_workers(3), machinery=pool.machinery)
    assert status("a", machinery=pool.machinery)[0].layout == TWO


@pytest.mark.parametrize("fails_at", ["reload", "end", "remove_groups"])
@pytest.mark.parametrize("broken", [ClusterError("Ray: it is silent"), KeyboardInterrupt()])
def test_down_ends_what_a_smaller_scale_left(
    begin: Callable[..., FakePool], fails_at: str, broken: BaseException
) -> None:
    pool = begin(TWO.with_replicas(2))
    scale("a", lambda layout: layout.with_replicas(3), machinery=pool.machinery)
    pool.fails_at, pool.broken = fails_at, broken
    with pytest.raises(type(broken)):
        scale("a", lambda layout: layout.with_replicas(1), machinery=pool.machinery)
    pool.fails_at = None
    assert down("a", machinery=pool.machinery)
    assert (pool.running, pool.groups, pool.registry) == ({}, {}, False)


def test_a_larger_scale_after_a_smaller_one_that_failed_has_each_worker_once(begin: Callable[..., FakePool]) -> None:
    pool = begin(TWO.with_replicas(2))
    pool.fails_at = "end"
    with pytest.raises(ClusterError):
        scale("a", lambda layout: layout.with_replicas(1), machinery=pool.machinery)
    pool.fails_at = None
    assert len(pool.running) == 4
    scale("a", lambda layout: layout.with_replicas(3), machinery=pool.machinery)
    assert sorted(pool.running) == list(range(6))
    down("a", machinery=pool.machinery)
    assert (pool.running, pool.groups) == ({}, {})


@pytest.mark.parametrize("fails_at", ["reload", "end", "remove_groups"])
def test_down_ends_what_a_larger_scale_left_that_could_not_be_taken_back(
    begin: Callable[..., FakePool], fails_at: str
) -> None:
    """The registry is lost, say: what else there is to do is done, and the first error is told."""
    pool = begin()
    place = pool.place

    def fail(groups: tuple[Group, ...], shards: dict[int, str], timeout_s: float) -> None:
        place(groups, shards, timeout_s)
        pool.fails_at = fails_at
        raise ClusterError("worker 3: no such model")

    pool.place = fail  # type: ignore[method-assign]
    with pytest.raises(ClusterError, match="worker 3: no such model"):
        scale("a", lambda layout: layout.with_replicas(2), machinery=pool.machinery)
    assert len(pool.running) == (4 if fails_at == "end" else 2)
    assert len(pool.groups) == (3 if fails_at == "remove_groups" else 1)
    assert status("a", machinery=pool.machinery)[0].layout == TWO
    pool.fails_at = None
    down("a", machinery=pool.machinery)
    assert (pool.running, pool.groups) == ({}, {})


@pytest.mark.parametrize("broken", [ClusterError("worker: no such model"), KeyboardInterrupt()])
def test_an_up_that_fails_leaves_nothing(begin: Callable[..., FakePool], broken: BaseException) -> None:
    pool = FakePool()
    pool.fails_at, pool.broken = 1, broken
    with pytest.raises(type(broken)):
        begin(pool=pool)
    assert (pool.running, pool.groups, pool.registry) == ({}, {}, False)
    assert known_clusters() == []
    begin(pool=FakePool())


def test_a_second_up_is_refused_and_another_name_is_not(begin: Callable[..., FakePool]) -> None:
    pool = begin()
    with pytest.raises(ClusterError, match="cluster a is there already"):
        begin()
    other = begin(name="b")
    assert down("a", machinery=pool.machinery)
    assert (pool.running, pool.groups, pool.registry) == ({}, {}, False)
    assert len(other.running) == 2
    with pytest.raises(ClusterError, match="there is no cluster a; there is b: tsqp cluster up"):
        status("a", machinery=pool.machinery)


def test_two_machines_may_begin_clusters_of_one_name_on_one_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = SharedRay()
    for machine in ("first", "second"):
        (tmp_path / machine).mkdir(mode=0o700)
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / machine))
        up("a", TWO, STARTED, joined=joined(tmp_path), machinery=ray.machinery)
    first, second = ray.pools.values()
    assert down("a", machinery=ray.machinery)
    assert (second.running, second.groups, second.registry) == ({}, {}, False)
    assert (len(first.running), len(first.groups), first.registry) == (2, 1, True)


def test_a_name_with_a_slip_makes_nothing_and_is_told_apart_from_one_that_is_broken(
    begin: Callable[..., FakePool],
) -> None:
    begin(name="b")
    path = ClusterDirectory("b").path
    replace_private(path / "cluster.json", b"{")
    machinery = FakePool().machinery
    for command in (status, lambda name, machinery: scale(name, lambda layout: layout, machinery=machinery)):
        with pytest.raises(ClusterError, match=r"^there is no cluster a; there is b: tsqp cluster up begins one$"):
            command("a", machinery=machinery)
    assert not down("a", machinery=machinery)
    assert {other.name for other in path.parent.iterdir()} == {"b", "b.lock"}


def test_a_ray_of_somebody_elses_that_is_gone_is_told_and_what_is_here_is_cleared_away(
    begin: Callable[..., FakePool],
) -> None:
    pool = begin()
    pool.gone = True
    with pytest.raises(
        ClusterError, match=r"the Ray at .* cannot be joined; nobody listens there any more, and what is here"
    ):
        down("a", machinery=pool.machinery)
    assert known_clusters() == []
    with pytest.raises(ClusterError, match=r"^the Ray at .* cannot be joined$"):
        begin(pool=pool)
    assert known_clusters() == []


@pytest.mark.parametrize("fails_at", ["connect", "end", "remove_groups"])
def test_what_was_not_ended_on_a_ray_of_somebody_elses_is_still_known(
    begin: Callable[..., FakePool], fails_at: str
) -> None:
    """Its actors outlive every command, and nobody else knows their names."""
    pool = begin()
    pool.silent, pool.fails_at = fails_at == "connect", fails_at
    with pytest.raises(ClusterError, match=r"tsqp cluster down --name a tries again.*remove /.*/a\b"):
        down("a", machinery=pool.machinery)
    assert known_clusters() == ["a"]
    with pytest.raises(ClusterError, match="cluster a is there already"):
        begin()
    pool.silent, pool.fails_at = False, None
    assert down("a", machinery=pool.machinery)
    assert (pool.running, pool.groups, pool.registry) == ({}, {}, False)
    assert known_clusters() == []


def test_an_up_that_fails_and_cannot_be_undone_is_still_known(begin: Callable[..., FakePool]) -> None:
    class Leaving(FakePool):
        def place(self, groups: tuple[Group, ...], shards: dict[int, str], timeout_s: float) -> None:
            super().place(groups, shards, timeout_s)
            self.silent = True
            raise ClusterError("worker: no such model")

    pool = Leaving()
    with pytest.raises(ClusterError, match=r"^worker: no such model; the Ray at .* --name a tries again"):
        begin(pool=pool)
    assert known_clusters() == ["a"]
    pool.silent = False
    assert down("a", machinery=pool.machinery)
    assert (pool.running, pool.groups, pool.registry) == ({}, {}, False)


def test_an_up_that_never_joined_its_ray_leaves_nothing(begin: Callable[..., FakePool]) -> None:
    pool = FakePool()
    pool.silent = True
    with pytest.raises(ClusterError, match=r"^the Ray at .* cannot be joined$"):
        begin(pool=pool)
    assert known_clusters() == []


def test_a_cluster_whose_ray_is_gone_is_noticed_and_cleared_away(begin: Callable[..., FakePool]) -> None:
    begin()
    directory = ClusterDirectory("a")
    record = directory.read()
    assert record is not None
    directory.write(msgspec.structs.replace(record, own=True))  # of which no process is left
    never = FakePool().machinery
    for command in (status, lambda name, machinery: scale(name, lambda layout: layout, machinery=machinery)):
        with pytest.raises(ClusterError, match="the Ray of cluster a is gone: tsqp cluster down --name a"):
            command("a", machinery=never)
    pool = begin()
    assert len(pool.running) == 2


class OwnRay:
    """A Ray of two processes: one has the mark alone, the other a file of Ray's open and no mark."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.pool = FakePool()
        self.machinery = self.pool.machinery._replace(start=self._start)

    def _start(self, directory: ClusterDirectory, ray_path: Path, nodes: int) -> str:
        ray_path.mkdir(mode=0o700)
        for log, variables in ((Path(os.devnull), {MARK: str(directory.path)}), (ray_path / "log", {})):
            with log.open("wb") as file:
                self.processes.append(subprocess.Popen(["sleep", "1000"], stderr=file, env=variables))
        return "127.0.0.1:6379"

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def own_ray() -> Iterator[OwnRay]:
    with closing(OwnRay()) as made:
        yield made


def test_down_finds_a_ray_that_was_started_with_another_temporary_directory(
    own_ray: OwnRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [tmp_path / name for name in ("one", "two")]
    for place in places:
        place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(places[0]))
    up("a", TWO, STARTED, machinery=own_ray.machinery)
    monkeypatch.setattr("tempfile.tempdir", str(places[1]))
    status("a", machinery=own_ray.machinery)
    with pytest.raises(ClusterError, match="is there already"):
        up("a", TWO, STARTED, machinery=own_ray.machinery)
    assert down("a", machinery=own_ray.machinery)
    assert [process.wait(LIMIT_S) for process in own_ray.processes] == [-signal.SIGTERM] * 2
    assert [list(place.iterdir()) for place in places] == [[], []]


def test_a_cluster_that_runs_and_is_not_known_any_more_is_ended_by_down_alone(own_ray: OwnRay) -> None:
    up("a", TWO, STARTED, machinery=own_ray.machinery)
    shutil.rmtree(ClusterDirectory("a").path)
    with pytest.raises(ClusterError, match="nothing is known any more: tsqp cluster down --name a"):
        up("a", TWO, STARTED, machinery=own_ray.machinery)
    assert [process.poll() for process in own_ray.processes] == [None, None]
    assert down("a", machinery=own_ray.machinery)
    assert [process.wait(LIMIT_S) for process in own_ray.processes] == [-signal.SIGTERM] * 2


def test_up_begins_a_cluster_anew_whose_ray_answers_nobody_though_processes_are_left(own_ray: OwnRay) -> None:
    up("a", TWO, STARTED, machinery=own_ray.machinery)
    left = list(own_ray.processes)
    own_ray.pool.lost()
    up("a", TWO, STARTED, machinery=own_ray.machinery._replace(listens=lambda address: False))
    assert [process.wait(LIMIT_S) for process in left] == [-signal.SIGTERM] * 2
    assert [process.poll() for process in own_ray.processes[2:]] == [None, None]
    assert down("a", machinery=own_ray.machinery)


def test_a_cluster_that_another_machine_began_is_left_alone(begin: Callable[..., FakePool]) -> None:
    """The directory of the state may be shared by machines."""
    pool = begin()
    directory = ClusterDirectory("a")
    record = directory.read()
    assert record is not None
    for own in (True, False):
        directory.write(msgspec.structs.replace(record, host="elsewhere", own=own))
        for command in (
            lambda: begin(pool=pool),
            lambda: status("a", machinery=pool.machinery),
            lambda: scale("a", lambda layout: layout, machinery=pool.machinery),
            lambda: down("a", machinery=pool.machinery),
        ):
            with pytest.raises(ClusterError, match=f"machine elsewhere: .* remove {directory.path}"):
                command()
    assert len(pool.running) == 2
    assert directory.read() is not None


def test_garbage_is_refused_by_all_but_down(begin: Callable[..., FakePool]) -> None:
    pool = begin()
    replace_private(ClusterDirectory("a").path / "cluster.json", b"{")
    with pytest.raises(ClusterError, match="clears it away"):
        status("a", machinery=pool.machinery)
    with pytest.raises(ClusterError, match="clears it away"):
        begin()
    assert down("a", machinery=pool.machinery)
    assert known_clusters() == []
