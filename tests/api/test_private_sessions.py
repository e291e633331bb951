"""Handshakes with several workers, one after another: who is silent takes nobody else's time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any, cast

import pytest

from tests.families import tiny_model
from tsqp.api import private_sessions
from tsqp.api.places import Dialled
from tsqp.api.private_sessions import REPLICA_S, PrivateSessions
from tsqp.api.until import Until
from tsqp.checkpoint import open_checkpoint
from tsqp.config.shard import Shard
from tsqp.errors import ChannelClosed, DeadlineExceeded
from tsqp.trusted.stats import Stats

CONFIG = open_checkpoint(str(tiny_model("llama").directory)).config
LEFT, RIGHT = Shard(0, CONFIG.num_layers + 1, 0, 1, 2), Shard(0, CONFIG.num_layers + 1, 1, 2, 2)
DEADLINE_S = 300.0


class FakeSession:
    def __init__(self, name: str) -> None:
        self.name = name
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


class FakeChannel:
    def __init__(self, name: str) -> None:
        self.name = self.address = name
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


class Greeted(PrivateSessions):
    """Sessions without workers. ``silent``: the names of those who say nothing, which takes no time here."""

    silent: Collection[str]
    given: dict[str, float | None]
    sessions: list[FakeSession]

    def open(self, channel: Any, *_: Any, **__: Any) -> Any:
        self.given[channel.name] = _[2]
        if channel.name in self.silent:
            raise DeadlineExceeded("sent nothing before the deadline", address=channel.name)
        self.sessions.append(FakeSession(channel.name))
        return self.sessions[-1]


def greeted(*silent: str) -> Greeted:
    made = Greeted(CONFIG, "fingerprint", DEADLINE_S)
    for name, value in {"silent": silent, "given": {}, "sessions": []}.items():
        object.__setattr__(made, name, value)  # it is frozen
    return made


def named(**shards: Shard | None) -> list[Dialled]:
    return [Dialled(cast(Any, FakeChannel(name)), shard, name) for name, shard in shards.items()]


@pytest.fixture(autouse=True)
def _plain_team(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_sessions, "Team", lambda members, *_: [member.session.name for member in members])


def team(sessions: Greeted, dialled: Sequence[Dialled], until: Until) -> Any:
    model: Any = type("Model", (), {"shard_digests": defaultdict(dict), "digests": {}})
    return sessions.team(dialled, model, cast(Any, None), Stats(), until)


def test_each_silent_replica_has_its_share_and_the_last_hope_of_a_shard_all_that_is_left() -> None:
    """Otherwise one silent replica of each shard would be enough to use up any patience."""
    sessions = greeted("a", "b", "d", "e")
    dialled = named(a=LEFT, b=LEFT, c=LEFT, d=RIGHT, e=RIGHT, f=RIGHT)
    assert team(sessions, dialled, Until(12.0)) == ["c", "f"]
    expected = {"a": 12 / 6, "b": 12 / 5, "c": 12.0, "d": 12 / 3, "e": 12 / 2, "f": 12.0}
    assert sessions.given == {name: pytest.approx(share, rel=0.1) for name, share in expected.items()}


def test_a_replica_is_waited_for_no_longer_than_ten_seconds_and_at_the_start_as_long_as_a_call() -> None:
    dialled = named(a=LEFT, b=LEFT, c=RIGHT)
    for until, most in ((Until(1000.0), 1000.0), (Until(), DEADLINE_S)):
        sessions = greeted("a")
        assert team(sessions, dialled, until) == ["b", "c"]
        assert sessions.given["a"] == REPLICA_S
        assert [sessions.given[name] for name in "bc"] == [pytest.approx(most, rel=0.1)] * 2


def test_once_time_is_over_nobody_is_waited_for() -> None:
    sessions = greeted()
    team(sessions, named(a=LEFT, b=LEFT, c=RIGHT), Until(0.0))
    assert set(sessions.given.values()) == {0.0}


def test_where_nobody_is_left_of_a_shard_the_others_are_not_greeted_and_nobody_is_kept() -> None:
    sessions = greeted("b", "c")
    with pytest.raises(DeadlineExceeded) as caught:
        team(sessions, named(a=LEFT, b=RIGHT, c=RIGHT, d=LEFT), Until(10.0))
    assert caught.value.worker == "c"
    assert list(sessions.given) == ["a", "b", "c"]
    assert [session.closed for session in sessions.sessions] == [1]


def test_whoever_is_told_to_stop_greets_nobody_else_and_keeps_nobody() -> None:
    sessions = greeted()
    with pytest.raises(ChannelClosed, match="the model was closed"):
        team(sessions, named(a=LEFT, b=RIGHT), Until(None, lambda: bool(sessions.sessions)))
    assert list(sessions.given) == ["a"]
    assert [session.closed for session in sessions.sessions] == [1]


def dealers(sessions: Greeted, dialled: Sequence[Dialled], until: Until) -> list[str]:
    made: Any = sessions.dealers(dialled, {}, until)
    return [one.session.name for one in made._dealers]


def test_a_silent_dealer_is_waited_for_no_longer_than_a_silent_replica_while_another_is_left() -> None:
    for silent, there in (("a", ["b"]), ("b", ["a"])):
        sessions = greeted(silent)
        assert dealers(sessions, named(a=None, b=None), Until()) == there
        assert sessions.given[silent] == REPLICA_S
    sessions = greeted("a", "b")
    assert dealers(sessions, named(a=None, b=None, c=None), Until(9.0)) == ["c"]
    assert sessions.given == {
        name: pytest.approx(share, rel=0.1) for name, share in {"a": 3.0, "b": 4.5, "c": 9.0}.items()
    }


def test_the_last_dealer_that_may_come_has_all_the_time_there_is() -> None:
    for count in (1, 2):
        sessions = greeted(*"ab"[:count])
        dialled = named(**dict.fromkeys("ab"[:count]))
        with pytest.raises(DeadlineExceeded):
            dealers(sessions, dialled, Until())
        assert sessions.given["ab"[count - 1]] == pytest.approx(DEADLINE_S, rel=0.1)
        assert all(cast(Any, one.channel).closed for one in dialled)


def test_whoever_is_told_to_stop_greets_no_further_dealer_and_keeps_none() -> None:
    sessions, dialled = greeted(), named(a=None, b=None)
    with pytest.raises(ChannelClosed):
        dealers(sessions, dialled, Until(None, lambda: bool(sessions.sessions)))
    assert list(sessions.given) == ["a"]
    assert [session.closed for session in sessions.sessions] == [1]
    assert [cast(Any, one.channel).closed for one in dialled] == [1, 1]


def test_a_worker_alone_has_all_of_the_time_from_when_it_is_there() -> None:
    """One that is started beside this process may have needed more than patience to load."""
    channel: Any = FakeChannel("a")
    for until, given in ((Over(7.0), 7.0), (Until(), DEADLINE_S)):
        sessions = greeted()
        sessions.one(channel, Stats(), {}, until)
        assert sessions.given["a"] == pytest.approx(given, rel=0.1)


class Over(Until):
    """An end that has come."""

    def left_s(self, otherwise: float) -> float:
        return 0.0
