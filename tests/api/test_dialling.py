"""A team is dialled for so long and no longer, and further replicas are waited for once."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Collection, Iterator
from typing import Any

import pytest

from tsqp.api import dialling
from tsqp.api.dialling import Dialling
from tsqp.api.until import Until
from tsqp.config.shard import Shard
from tsqp.errors import ChannelClosed, WorkerUnreachable
from tsqp.wire.roster import Member
from tsqp.wire.transport.base import Deadline

LEFT, RIGHT = Shard(0, 3, 0, 1, 2), Shard(0, 3, 1, 2, 2)
WAIT_S = 20.0


def member(number: int, shard: Shard) -> Member:
    return Member(f"tcp://127.0.0.1:{number}", str(shard))


class FakeChannel:
    def __init__(self) -> None:
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()


class Workers:
    """``held``: those who answer when their event is set; ``down``: those who do not listen."""

    def __init__(self) -> None:
        self.held: dict[str, threading.Event] = {}
        self.down: set[str] = set()
        self.asked: list[str] = []
        self.reached: dict[str, FakeChannel] = {}

    def hold(self, one: Member) -> threading.Event:
        return self.held.setdefault(one.name, threading.Event())

    def connect(self, one: Member) -> Any:
        self.asked.append(one.name)
        if one.name in self.held:
            assert self.held[one.name].wait(WAIT_S)
        if one.name in self.down:
            raise WorkerUnreachable(f"{one.name}: no worker listens there")
        self.reached[one.name] = FakeChannel()
        return self.reached[one.name]


@pytest.fixture
def workers() -> Iterator[Workers]:
    """At the end everybody answers, so that no thread stays."""
    made = Workers()
    yield made
    for event in made.held.values():
        event.set()


def test_the_grace_of_replicas_begins_when_each_shard_has_a_worker(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialling, "GRACE_S", 0.001)
    left, right = member(1, LEFT), member(2, RIGHT)
    late = workers.hold(right)
    until_now = concurrent.futures.wait

    def wait(asked: Collection[Any], timeout: float, when: str) -> Any:
        found = until_now(asked, timeout, when)
        if not found.done and workers.reached:  # nobody has come for a while
            late.set()
        return found

    monkeypatch.setattr(dialling, "wait", wait)
    team = Dialling(workers.connect, {LEFT: [left], RIGHT: [right]}, 4, Until(WAIT_S)).channels()
    assert [one.name for one in team] == [left.name, right.name]


def test_the_grace_of_replicas_does_not_begin_again_with_each_of_them(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (member(number, LEFT) for number in (1, 2, 3))
    comes, begun, taken = workers.hold(second), list[float](), set[Any]()
    workers.hold(third)
    until_now = concurrent.futures.wait

    def wait(asked: Collection[Any], timeout: float, when: str) -> Any:
        found = until_now(asked, timeout, when)
        taken.update(found.done)
        return found

    class Counted(Deadline):
        def __init__(self, seconds: float | None) -> None:
            super().__init__(seconds)
            assert seconds is not None
            begun.append(seconds)
            comes.set()

        @property
        def passed(self) -> bool:
            return len(taken) == 2 and super().passed  # the second comes in time, however long that is here

    monkeypatch.setattr(dialling, "wait", wait)
    monkeypatch.setattr(dialling, "GRACE_S", 0.01)
    monkeypatch.setattr(dialling, "Deadline", Counted)
    team = Dialling(workers.connect, {LEFT: [first, second, third]}, 4, Until(WAIT_S)).channels()
    assert [one.name for one in team] == [first.name, second.name]
    assert begun == [0.01]


def test_no_further_round_begins_once_the_time_is_over(workers: Workers) -> None:
    """However quick each answer is: whoever writes a roster has thousands of names."""
    many = [member(number, LEFT) for number in range(1, 4097)]
    workers.down = {one.name for one in many}

    class FewRounds(Until):
        @property
        def passed(self) -> bool:
            return len(workers.asked) >= 8

    with pytest.raises(WorkerUnreachable, match="no worker listens there"):
        Dialling(workers.connect, {LEFT: many}, 4, FewRounds()).channels()
    assert len(workers.asked) == 8


def test_one_that_is_there_when_the_time_is_over_is_enough(workers: Workers) -> None:
    first, second = member(1, LEFT), member(2, LEFT)
    workers.hold(second)

    class OnceReached(Until):
        @property
        def passed(self) -> bool:
            return bool(workers.reached)

    dialled = Dialling(workers.connect, {LEFT: [first, second]}, 4, OnceReached()).channels()
    assert [one.name for one in dialled] == [first.name]


def test_whoever_is_told_to_stop_waits_for_nobody_and_closes_what_comes(workers: Workers) -> None:
    left, right = member(1, LEFT), member(2, RIGHT)
    late = workers.hold(right)
    until = Until(None, lambda: left.name in workers.reached and right.name in workers.asked)
    with pytest.raises(ChannelClosed, match="the model was closed"):
        Dialling(workers.connect, {LEFT: [left], RIGHT: [right]}, 4, until).channels()
    assert workers.reached[left.name].closed.wait(WAIT_S)
    late.set()
    while right.name not in workers.reached:
        threading.Event().wait(0.001)
    assert workers.reached[right.name].closed.wait(WAIT_S)


def test_nobody_is_dialled_by_whom_is_told_to_stop_before(workers: Workers) -> None:
    with pytest.raises(ChannelClosed):
        Dialling(workers.connect, {LEFT: [member(1, LEFT)]}, 4, Until(None, lambda: True)).channels()
    assert not workers.asked
