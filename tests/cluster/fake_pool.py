"""A pool of workers without Ray: it keeps what it was told, and fails where a test says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from tsqp.cluster.book import Entry, State
from tsqp.cluster.control import JoinedRay, Machinery
from tsqp.cluster.pool import Pool
from tsqp.cluster.registry import View
from tsqp.cluster.state import ClusterDirectory, Group, Record, Started
from tsqp.errors import ClusterError

STARTED = Started("synthetic:tiny", "cpu", 1, "127.0.0.1", ())
FRONT = "roster+tcp://127.0.0.1:7777"


class FakePool:
    """``running``: shards by number. ``known``: what the registry read from the directory."""

    def __init__(self) -> None:
        self.running: dict[int, str] = {}
        self.groups: dict[str, tuple[int, ...]] = {}
        self.known: list[tuple[int, str]] = []
        self.events: list[str] = []
        self.registry = False
        self.gone = self.silent = False  # nobody listens; somebody does, and cannot be joined
        self.state: State = "listening"
        self.states: Iterator[State] = iter(())  # those of the first looks, of all workers
        self.fails_at: int | str | None = None  # a worker that does not start, or a method
        self.broken: BaseException = ClusterError("worker: no such model")
        self._directory: ClusterDirectory | None = None

    @property
    def machinery(self) -> Machinery:
        return Machinery(
            lambda directory, ray_path, nodes: "127.0.0.1:6379",
            lambda address, token: None,
            self._connect,
            lambda address: not self.gone,
        )

    def open_registry(self) -> str:
        self.registry = True
        self.reload()
        return FRONT

    def reload(self) -> None:
        self._may_fail("reload")
        assert self._directory is not None
        record = self._directory.read()
        assert record is not None
        self.known = [(number, record.layout.shard_of(number)) for number in range(record.layout.workers)]
        self.events.append(f"roster of {len(self.known)}")

    def view(self) -> View:
        state = next(self.states, self.state)
        entries = tuple(Entry(number, shard, state, 0) for number, shard in self.known)
        return View(1, FRONT, entries)

    def place(self, groups: tuple[Group, ...], shards: dict[int, str], timeout_s: float) -> None:
        self.groups |= {group.name: group.numbers for group in groups}
        numbers = [number for group in groups for number in group.numbers if number in shards]
        assert sorted(numbers) == sorted(shards)
        for number in numbers:
            if number == self.fails_at:
                raise self.broken
            assert number not in self.running
            self.running[number] = shards[number]
            self.events.append(f"start {number}")

    def end(self, numbers: tuple[int, ...]) -> None:
        self._may_fail("end")
        for number in numbers:
            if self.running.pop(number, None) is not None:
                self.events.append(f"end {number}")

    def remove_groups(self, groups: tuple[Group, ...]) -> None:
        self._may_fail("remove_groups")
        for group in groups:
            self.groups.pop(group.name, None)

    def close_registry(self) -> None:
        self.registry = False

    def _may_fail(self, method: str) -> None:
        if method == self.fails_at:
            raise self.broken

    def lost(self) -> None:
        """All of its processes have ended."""
        self.registry = False
        self.running.clear()
        self.groups.clear()

    @contextmanager
    def _connect(self, directory: ClusterDirectory, record: Record) -> Iterator[Pool]:
        if self.gone or self.silent:
            raise ClusterError(f"the Ray at {record.ray} cannot be joined")
        self._directory = directory
        yield self


class SharedRay:
    """A Ray of many machines: each namespace has a pool of its own, by its name."""

    def __init__(self) -> None:
        self.pools: dict[str, FakePool] = {}

    @property
    def machinery(self) -> Machinery:
        return FakePool().machinery._replace(connect=self._connect)

    def _connect(self, directory: ClusterDirectory, record: Record) -> AbstractContextManager[Pool]:
        return self.pools.setdefault(record.namespace, FakePool())._connect(directory, record)


def joined(directory: Path) -> JoinedRay:
    """A Ray of somebody else's, with a token in a file."""
    return JoinedRay("127.0.0.1:6379", directory / "token")
