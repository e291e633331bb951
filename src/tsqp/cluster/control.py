"""The four commands: a cluster is begun, looked at, made larger or smaller, and ended.

Whatever fails in ``up`` takes what was begun with it. A cluster whose Ray is gone is noticed by its processes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from tsqp.cluster.connection import Connect, connected, listens
from tsqp.cluster.layout import Layout
from tsqp.cluster.own_ray import check_asks_for_token, start_ray
from tsqp.cluster.pool import Pool
from tsqp.cluster.processes import end_processes, processes_of
from tsqp.cluster.registry import View
from tsqp.cluster.state import ClusterDirectory, Group, Record, Started, known_clusters, new_namespace
from tsqp.errors import ClusterError

START_TIMEOUT_S = 600.0  # a large model takes minutes to read from a slow disk
HEARD_S, LOOK_S = 30.0, 0.05  # until the registry has heard of workers that listen, and how often to ask


class Machinery(NamedTuple):
    """What of Ray the commands use: tests put something else in its place."""

    start: Callable[[ClusterDirectory, Path, int], str] = start_ray
    check: Callable[[str, Path], None] = check_asks_for_token
    connect: Connect = connected
    listens: Callable[[str], bool] = listens


RAY = Machinery()
LayoutChange = Callable[[Layout], Layout]


class JoinedRay(msgspec.Struct, frozen=True):
    """A Ray that somebody else runs: host and port, and the file with its token."""

    address: str
    token: Path


def up(
    name: str,
    layout: Layout,
    started: Started,
    *,
    joined: JoinedRay | None = None,
    nodes: int = 1,
    timeout_s: float = START_TIMEOUT_S,
    machinery: Machinery = RAY,
) -> View:
    """Begin a cluster, and wait until all of its workers listen. Raises ClusterError, OptionError, PathRefused.

    ``nodes``: of a Ray on this machine alone, several stand for several machines.
    """
    directory = ClusterDirectory(name)
    with directory.locked():
        _clear(directory, _refuse_second(directory, machinery))
        record, begun = None, False
        try:
            if joined is not None:
                machinery.check(joined.address, joined.token)
            record = _new_record(directory, layout, started, joined)
            directory.write(record)  # before Ray, so that whatever is left of a Ray is found
            if joined is None:
                address = machinery.start(directory, Path(record.ray_path), nodes)
                record = msgspec.structs.replace(record, ray=address)
                directory.write(record)
            with machinery.connect(directory, record) as pool:
                begun = True
                record = msgspec.structs.replace(record, front=pool.open_registry())
                directory.write(record)
                _place(pool, record, range(layout.workers), timeout_s)
                return _view_of_all(pool)
        except BaseException as error:  # Ctrl-C too
            try:
                if begun:
                    _end(directory, record, machinery)
                else:
                    _clear(directory, record)
            except ClusterError as left:
                if isinstance(error, ClusterError):
                    raise ClusterError(f"{error}; {left}") from None
            raise


def status(name: str, *, machinery: Machinery = RAY) -> tuple[Record, View]:
    """What there is. Raises ClusterError where there is none, or its Ray is gone."""
    directory, record = _existing(name)
    with machinery.connect(directory, record) as pool:
        return record, pool.view()


def scale(name: str, change: LayoutChange, *, timeout_s: float = START_TIMEOUT_S, machinery: Machinery = RAY) -> View:
    """Another number of workers for each shard. Workers that stay are not touched. Raises ClusterError, OptionError."""
    directory, _ = _existing(name)
    with directory.locked():
        directory, before = _existing(name)
        layout = change(before.layout)
        with machinery.connect(directory, before) as pool:
            if layout.replicas >= before.replicas:
                return _grow(directory, before, layout, pool, timeout_s)
            return _shrink(directory, before, layout, pool)


def down(name: str, *, machinery: Machinery = RAY) -> bool:
    """End it, and leave nothing. Whether there was anything.

    Raises ClusterError where a process does not end; where it runs on somebody else's Ray, that could not be told to
    end it, it stays known.
    """
    directory = ClusterDirectory(name)
    with directory.locked():
        record = None
        with suppress(ClusterError):  # what cannot be read is cleared away all the same
            record = directory.read()
        running = _runs(directory, record)
        there = record is not None or running or directory.path.exists()
        _end(directory, record, machinery)
        return there


def _new_record(directory: ClusterDirectory, layout: Layout, started: Started, joined: JoinedRay | None) -> Record:
    return Record(
        version=2,
        name=directory.name,
        host=os.uname().nodename,
        namespace=new_namespace(directory.name),
        ray="" if joined is None else joined.address,
        own=joined is None,
        ray_path=str(directory.ray_path()) if joined is None else "",
        token=str(directory.token if joined is None else joined.token.absolute()),
        front="",
        started=started,
        shards=layout.shards,
        replicas=layout.replicas,
        groups=_groups(directory.name, layout, 0),
    )


def _grow(directory: ClusterDirectory, before: Record, layout: Layout, pool: Pool, timeout_s: float) -> View:
    new = range(before.layout.workers, layout.workers)
    placed = {number for group in before.groups for number in group.numbers}
    first = max(placed, default=-1) + 1
    groups = (*before.groups, *_groups(before.name, layout, first))
    after = msgspec.structs.replace(before, replicas=layout.replicas, groups=groups)
    directory.write(after)
    try:
        pool.end(tuple(new))  # a smaller scale that was interrupted leaves some
        pool.reload()
        _place(pool, after, new, timeout_s)
    except BaseException:  # back to what there was
        _take_back(directory, before, after, pool)
        raise
    return _view_of_all(pool)


def _take_back(directory: ClusterDirectory, before: Record, after: Record, pool: Pool) -> None:
    """Each step, whether or not those before it succeed. What may be left stays in the record, for `down`."""
    left = msgspec.structs.replace(before, groups=after.groups)
    with suppress(ClusterError):
        try:
            pool.end(tuple(range(before.layout.workers, after.layout.workers)))
        finally:
            pool.remove_groups(after.groups[len(before.groups) :])
        left = before
    directory.write(left)
    with suppress(ClusterError):
        pool.reload()


def _shrink(directory: ClusterDirectory, before: Record, layout: Layout, pool: Pool) -> View:
    """The roster forgets them first, so that no new link has one of them. Groups keep their places for later.

    A group stays in the record until its workers have ended, so that `down` ends those of a command that was killed.
    """
    gone = tuple(range(layout.workers, before.layout.workers))
    emptied = tuple(group for group in before.groups if set(group.numbers) <= set(gone))
    kept = tuple(group for group in before.groups if group not in emptied)
    smaller = msgspec.structs.replace(before, replicas=layout.replicas)
    directory.write(smaller)
    pool.reload()
    pool.end(gone)
    pool.remove_groups(emptied)
    directory.write(msgspec.structs.replace(smaller, groups=kept))
    return pool.view()


def _place(pool: Pool, record: Record, numbers: range, timeout_s: float) -> None:
    shards = {number: record.layout.shard_of(number) for number in numbers}
    pool.place(record.groups, shards, timeout_s)


def _view_of_all(pool: Pool) -> View:
    """What there is, once the registry has heard of each worker: they say so themselves, soon after they listen.

    Raises ClusterError where one of them does not.
    """
    end = time.monotonic() + HEARD_S
    while True:
        view = pool.view()
        silent = [str(one.number) for one in view.workers if one.state != "listening"]
        if not silent:
            return view
        if time.monotonic() >= end:
            raise ClusterError(f"worker {', '.join(silent)} was started, and is not in the roster after {HEARD_S:g} s")
        time.sleep(LOOK_S)


def _groups(name: str, layout: Layout, first: int) -> tuple[Group, ...]:
    return tuple(Group(f"tsqp-{name}-{numbers[0]}", numbers) for numbers in layout.groups(first))


def _existing(name: str) -> tuple[ClusterDirectory, Record]:
    """Raises ClusterError where there is none, or its Ray is gone."""
    directory = ClusterDirectory(name)
    record = directory.read()
    if record is None:
        others = known_clusters()
        known = f"; there is {', '.join(others)}" if others else ""
        raise ClusterError(f"there is no cluster {name}{known}: tsqp cluster up begins one")
    if not _runs(directory, record) and record.own:
        raise ClusterError(f"the Ray of cluster {name} is gone: tsqp cluster down --name {name} clears it away")
    return directory, record


def _refuse_second(directory: ClusterDirectory, machinery: Machinery) -> Record | None:
    """The record of one that is gone, if processes of it are left or not. Raises ClusterError where one is there."""
    record = directory.read()
    running = _runs(directory, record)
    if record is None and running:
        raise ClusterError(
            f"processes of a cluster {directory.name} run, of which nothing is known any more: tsqp cluster down "
            f"--name {directory.name} ends them"
        )
    if record is not None and (not record.own or (running and machinery.listens(record.ray))):
        raise ClusterError(
            f"cluster {directory.name} is there already: tsqp cluster scale changes it, tsqp cluster down ends it, "
            "and another --name begins another"
        )
    return record


def _runs(directory: ClusterDirectory, record: Record | None) -> bool:
    """Whether processes of it are here. Raises ClusterError where another machine began it, whose cannot be seen."""
    running = bool(processes_of(directory.path, directory.ray_path(record)))
    if record is not None and not running and record.host != os.uname().nodename:
        raise ClusterError(
            f"cluster {record.name} was begun on machine {record.host}: run the command there, or remove "
            f"{directory.path} if that machine is no more"
        )
    return running


def _end(directory: ClusterDirectory, record: Record | None, machinery: Machinery) -> None:
    """Raises ClusterError. On somebody else's Ray its actors outlive every command, and the record is all that names
    them: it goes when they have ended, or nobody listens there any more.
    """
    if record is not None and not record.own:
        try:
            with machinery.connect(directory, record) as pool:
                pool.end(tuple(number for group in record.groups for number in group.numbers))
                pool.close_registry()
                pool.remove_groups(record.groups)
        except ClusterError as error:
            if machinery.listens(record.ray):
                raise ClusterError(
                    f"{error}; what runs there was not ended: tsqp cluster down --name {record.name} tries again, or "
                    f"remove {directory.path} if that Ray is no more"
                ) from None
            _clear(directory, record)
            raise ClusterError(f"{error}; nobody listens there any more, and what is here was cleared away") from None
    _clear(directory, record)


def _clear(directory: ClusterDirectory, record: Record | None) -> None:
    """End what is left of a cluster of this machine, and remove its files."""
    ray_path = directory.ray_path(record)
    end_processes(directory.path, ray_path)
    directory.remove(ray_path)
