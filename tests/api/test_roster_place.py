"""Who is dialled of those that a roster names, who is left out, and what is said where no team can be made."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.families import tiny_model
from tests.public_keys import KEYS
from tsqp.api import dialling, roster_place
from tsqp.api.roster_place import MOST_CONNECTIONS, MOST_EXPELLED, MOST_REPLICAS, RosterPlace
from tsqp.api.until import Until
from tsqp.checkpoint import open_checkpoint
from tsqp.config.shard import Shard
from tsqp.config.tiling import MOST_SLICES
from tsqp.errors import AddressError, PathRefused, RosterError, TsqpError, WorkerUnreachable
from tsqp.wire.roster import Member, Roster
from tsqp.wire.transport.front import parse_roster_address

CONFIG = open_checkpoint(str(tiny_model("llama").directory)).config
END = CONFIG.num_layers + 1
WHOLE, LEFT, RIGHT = f"0..{END}", f"0..{END}/0..1of2", f"0..{END}/1..2of2"
WAIT_S = 20.0


def member(number: int, shard: str, key: str | None = None) -> Member:
    return Member(f"tcp://127.0.0.1:{number}", shard, key)


def name(number: int) -> str:
    return member(number, WHOLE).name


class FakeChannel:
    def __init__(self, member: Member) -> None:
        self.member = member
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()


class Scene:
    """A place, whose roster and whose workers are ours. ``down``: dialling a member raises this."""

    def __init__(self, *members: Member, epoch: int = 1, has_key: bool = True) -> None:
        self.roster: Roster | RosterError = Roster(1, epoch, members)
        self.down: dict[str, Exception] = {}
        self.hangs: dict[str, threading.Event] = {}
        self.channels: list[FakeChannel] = []
        self.asked: list[str] = []
        self.sharing: list[int] = []
        self.room = 1000
        self.place = RosterPlace(
            parse_roster_address("roster:///run/roster.json"),
            self.find,
            self.connect,
            lambda: CONFIG,
            has_key=has_key,
            shuffle=lambda members: None,
            room=lambda: self.room,
        )

    def find(self) -> Roster:
        if isinstance(self.roster, RosterError):
            raise self.roster
        return self.roster

    def connect(self, member: Member, sharing: int) -> Any:
        self.asked.append(member.name)
        self.sharing.append(sharing)
        if member.name in self.hangs:
            assert self.hangs[member.name].wait(WAIT_S)
        if member.name in self.down:
            raise self.down[member.name]
        self.channels.append(FakeChannel(member))
        return self.channels[-1]

    def now(self, *members: Member, epoch: int = 2) -> None:
        self.roster = Roster(1, epoch, members)

    def dialled(self) -> list[tuple[str, str]]:
        """Shards and names."""
        return [(str(one.shard or WHOLE), one.name) for one in self.place.dial(Until())]


def unreachable(number: int) -> WorkerUnreachable:
    return WorkerUnreachable(f"tcp://127.0.0.1:{number}: no worker listens there")


@pytest.fixture
def events() -> Iterator[list[threading.Event]]:
    """Set at the end, so that no thread stays."""
    made: list[threading.Event] = []
    yield made
    for event in made:
        event.set()


def test_a_worker_of_each_shard_is_dialled_with_its_replicas_in_the_order_of_columns() -> None:
    scene = Scene(member(1, RIGHT), member(2, LEFT), member(3, RIGHT))
    assert scene.dialled() == [(LEFT, name(2)), (RIGHT, name(1)), (RIGHT, name(3))]
    assert scene.place.dial(Until())[0].shard == Shard.parse(LEFT)


def test_a_worker_with_a_key_is_known_by_it() -> None:
    scene = Scene(member(1, WHOLE, KEYS[0]))
    assert scene.dialled() == [(WHOLE, KEYS[0])]


def test_one_that_holds_all_of_the_model_is_asked_as_one_without_a_roster_is() -> None:
    assert [one.shard for one in Scene(member(1, WHOLE)).place.dial(Until())] == [None]
    assert [str(one.shard) for one in Scene(member(1, WHOLE), member(2, WHOLE)).place.dial(Until())] == [WHOLE] * 2


def test_of_many_replicas_a_few_are_dialled_and_the_next_ones_only_for_want_of_them() -> None:
    scene = Scene(*(member(number, WHOLE) for number in range(1, MOST_REPLICAS + 3)))
    assert len(scene.dialled()) == MOST_REPLICAS
    assert sorted(scene.asked) == [name(number) for number in range(1, MOST_REPLICAS + 1)]
    scene.down = {name(number): unreachable(number) for number in range(1, MOST_REPLICAS + 2)}
    assert scene.dialled() == [(WHOLE, name(MOST_REPLICAS + 2))]


@pytest.mark.parametrize("error", [unreachable(1), PathRefused.__new__(PathRefused), OSError("no descriptors")])
def test_one_that_cannot_be_reached_is_left_out_where_a_replica_is_there(error: Exception) -> None:
    scene = Scene(member(1, LEFT), member(2, LEFT), member(3, RIGHT))
    scene.down = {name(1): error}
    assert scene.dialled() == [(LEFT, name(2)), (RIGHT, name(3))]


def test_a_shard_that_nobody_can_be_reached_for_is_named_with_an_address_and_nobody_is_kept() -> None:
    scene = Scene(member(1, LEFT), member(2, RIGHT))
    scene.down = {name(2): unreachable(2)}
    with pytest.raises(WorkerUnreachable, match=rf"no worker that holds {RIGHT} can be reached: tcp://127.0.0.1:2: no"):
        scene.place.dial(Until())
    assert [channel.closed.is_set() for channel in scene.channels] == [True]


def test_a_fault_of_this_side_closes_what_was_opened() -> None:
    scene = Scene(member(1, LEFT), member(2, RIGHT))
    scene.down = {name(2): ZeroDivisionError()}
    with pytest.raises(ZeroDivisionError):
        scene.place.dial(Until())
    assert all(channel.closed.wait(WAIT_S) for channel in scene.channels)


def test_a_replica_that_hangs_holds_up_nobody_and_is_left_when_it_comes(
    events: list[threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialling, "GRACE_S", 0.01)
    scene = Scene(member(1, LEFT), member(2, RIGHT), member(3, RIGHT))
    events.append(threading.Event())
    scene.hangs = {name(3): events[0]}
    assert scene.dialled() == [(LEFT, name(1)), (RIGHT, name(2))]
    events[0].set()
    while len(scene.channels) < 3:
        threading.Event().wait(0.001)
    assert scene.channels[2].closed.wait(WAIT_S)
    assert not any(channel.closed.is_set() for channel in scene.channels[:2])


def test_black_holes_cost_no_more_than_the_time_there_is(
    events: list[threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 4,096 entries that answer nothing four at a time would be dialled for more than an hour."""
    events.append(threading.Event())
    scene = Scene(*(member(number, WHOLE) for number in range(1, 100)))
    scene.hangs = {name(number): events[0] for number in range(1, 100)}
    with pytest.raises(
        WorkerUnreachable, match=f"no worker that holds {WHOLE} can be reached: none of them .* in time"
    ):
        scene.place.dial(Until(0.01))
    assert len(scene.asked) <= MOST_REPLICAS
    monkeypatch.setattr(roster_place, "DIAL_S", 0.01)
    for until in (Until(), Until(1e6)):
        with pytest.raises(WorkerUnreachable):
            scene.place.dial(until)


def test_workers_are_dialled_at_the_same_time() -> None:
    scene = Scene(member(1, LEFT), member(2, RIGHT))
    both = threading.Barrier(2, timeout=WAIT_S)
    connect = scene.connect

    def at_once(member: Member, sharing: int) -> Any:
        both.wait()
        return connect(member, sharing)

    place = RosterPlace(parse_roster_address("roster:///x"), scene.find, at_once, lambda: CONFIG)
    assert len(place.dial(Until())) == 2


@pytest.mark.parametrize(
    ("shards", "says"),
    [
        ([], "nobody holds"),
        ([LEFT], "nobody holds the last columns"),
        ([RIGHT], "nobody holds some columns"),
        ([WHOLE, LEFT, RIGHT], "some columns are held twice"),
        ([f"0..{END - 1}"], "nobody holds the LM head"),
        ([f"1..{END}"], "nobody holds layers 0 to 0"),
    ],
)
def test_a_roster_that_is_no_model_is_refused_by_what_is_missing(shards: list[str], says: str) -> None:
    scene = Scene(*(member(number, shard) for number, shard in enumerate(shards, 1)))
    with pytest.raises(RosterError, match=rf"^roster:///run/roster.json: the workers do not make one model: {says}"):
        scene.place.dial(Until())
    assert not scene.asked


def test_those_who_share_memory_are_told_how_many_they_are() -> None:
    shared = [Member(f"shm:///run/{number}.sock", LEFT) for number in range(MOST_REPLICAS + 2)]
    scene = Scene(*shared, Member("shm:///run/right.sock", RIGHT), member(1, RIGHT))
    scene.place.dial(Until())
    assert set(scene.sharing) == {MOST_REPLICAS + 1}
    scene = Scene(member(1, LEFT), member(2, RIGHT), Member("shm:///run/right.sock", RIGHT))
    scene.place.dial(Until())
    assert set(scene.sharing) == {1}


def columns(of: int) -> list[str]:
    return [f"0..{END}/{number}..{number + 1}of{of}" for number in range(of)]


@pytest.mark.parametrize(
    ("shards", "says"),
    [
        (columns(MOST_SLICES + 9), f"divided into {MOST_SLICES + 9} shards of columns; the most is {MOST_SLICES}"),
        ([f"0..{END}/0..1of1024", f"0..{END}/1..1024of1024"], "has no output feature of"),
        (columns(MOST_CONNECTIONS + 1), f"divided among {MOST_CONNECTIONS + 1} workers"),
    ],
)
def test_a_team_that_cannot_be_is_refused_before_anybody_is_dialled(shards: list[str], says: str) -> None:
    scene = Scene(*(member(number, shard) for number, shard in enumerate(shards, 1)))
    for refused in (lambda: scene.place.dial(Until()), scene.place.shards):
        with pytest.raises(RosterError, match=f"^roster:///run/roster.json: .*{says}"):
            refused()
    assert not scene.asked


def test_there_are_as_many_replicas_as_there_is_room_for_and_no_team_without(caplog: pytest.LogCaptureFixture) -> None:
    shards = [LEFT, RIGHT] * MOST_REPLICAS
    scene = Scene(*(member(number, shard) for number, shard in enumerate(shards, 1)))
    for scene.room, replicas in ((8, 4), (7, 3), (2, 1)):
        caplog.clear()
        assert len(scene.dialled()) == 2 * replicas
        assert (f"no more than {replicas} of each shard are dialled" in caplog.text) == (replicas < MOST_REPLICAS)
    scene.room = 1
    scene.asked.clear()
    with pytest.raises(RosterError, match=r"a team of 2 workers, and .* room for 1: .*ulimit -n"):
        scene.place.dial(Until())
    assert not scene.asked


def test_a_team_is_not_larger_than_a_team_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster_place, "MOST_CONNECTIONS", 3)
    scene = Scene(*(member(number, shard) for number, shard in enumerate([LEFT, RIGHT] * 2, 1)))
    assert scene.dialled() == [(LEFT, name(1)), (RIGHT, name(2))]


def test_a_roster_with_keys_needs_one_here() -> None:
    scene = Scene(member(1, WHOLE, KEYS[0]), has_key=False)
    with pytest.raises(AddressError, match=r"worker\.key") as caught:
        scene.place.dial(Until())
    assert caught.value.fields == ("worker.key",)
    assert Scene(member(1, WHOLE), has_key=False).dialled() == [(WHOLE, name(1))]


def test_whoever_is_expelled_is_not_dialled_again_by_its_key_at_any_address() -> None:
    scene = Scene(member(1, LEFT, KEYS[0]), member(2, LEFT, KEYS[1]), member(3, RIGHT))
    scene.place.dial(Until())
    assert scene.place.expel(KEYS[0]) == KEYS[0]
    assert scene.dialled() == [(LEFT, KEYS[1]), (RIGHT, name(3))]
    scene.now(member(9, LEFT, KEYS[0]), member(3, RIGHT))
    scene.asked.clear()
    with pytest.raises(RosterError, match=f"nobody holds some columns.*; expelled: {re.escape(KEYS[0])}"):
        scene.place.dial(Until())
    assert not scene.asked
    scene.place.readmit(KEYS[0])
    assert scene.dialled() == [(LEFT, KEYS[0]), (RIGHT, name(3))]


def test_a_worker_that_is_started_in_its_place_is_dialled() -> None:
    scene = Scene(member(1, LEFT, KEYS[0]), member(3, RIGHT))
    scene.place.dial(Until())
    scene.place.expel(KEYS[0])
    scene.now(member(1, LEFT, KEYS[1]), member(3, RIGHT))
    assert scene.dialled() == [(LEFT, KEYS[1]), (RIGHT, name(3))]


def test_who_cheated_is_known_where_there_is_one_alone() -> None:
    scene = Scene(member(1, WHOLE))
    scene.place.dial(Until())
    assert scene.place.expel(None) == name(1)


def test_a_roster_has_not_as_many_guesses_as_names() -> None:
    scene = Scene(member(1, WHOLE))
    for number in range(1, MOST_EXPELLED + 1):
        scene.now(member(number, WHOLE))
        scene.place.dial(Until())
        assert scene.place.expel(name(number)) == name(number)
    scene.now(member(MOST_EXPELLED + 1, WHOLE))
    scene.place.dial(Until())
    assert scene.place.expel(name(MOST_EXPELLED + 1)) == scene.place.name
    scene.place.readmit("somebody of another roster")
    scene.now(member(1000, WHOLE))
    scene.place.dial(Until())
    assert scene.place.expel(name(1000)) == scene.place.name
    scene.place.readmit(scene.place.name)
    scene.now(*(member(number, WHOLE) for number in [*range(1, MOST_EXPELLED + 2), 1000, 1001]))
    assert scene.dialled() == [(WHOLE, name(1001))]  # of those who cheated nobody is back
    assert scene.place.expel(name(1001)) == name(1001)


def test_whoever_is_admitted_again_is_dialled_and_as_many_names_as_at_first_may_follow() -> None:
    scene = Scene(member(1, WHOLE))
    for number in range(1, MOST_EXPELLED + 1):
        scene.now(member(number, WHOLE))
        scene.place.dial(Until())
        scene.place.expel(name(number))
    scene.place.readmit(name(7))
    scene.now(*(member(number, WHOLE) for number in range(1, MOST_EXPELLED + 1)))
    assert scene.dialled() == [(WHOLE, name(7))]
    assert scene.place.expel(name(7)) == name(7)


@pytest.mark.parametrize(
    ("shards", "expected"), [([WHOLE], []), ([WHOLE, WHOLE], [WHOLE]), ([RIGHT, LEFT, RIGHT], [LEFT, RIGHT])]
)
def test_how_a_model_is_divided_is_known_before_anybody_is_dialled(shards: list[str], expected: list[str]) -> None:
    scene = Scene(*(member(number, shard) for number, shard in enumerate(shards, 1)))
    assert [str(shard) for shard in scene.place.shards()] == expected
    assert not scene.asked


@pytest.mark.parametrize("worker", [None, "tcp://127.0.0.1:77", KEYS[1]])
def test_where_it_is_not_known_who_cheated_nobody_there_is_asked_again(worker: str | None) -> None:
    scene = Scene(member(1, LEFT), member(2, RIGHT))
    scene.place.dial(Until())
    assert scene.place.expel(worker) == scene.place.name == "roster:///run/roster.json"


def test_the_last_roster_is_used_while_there_is_no_other(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(member(1, WHOLE), epoch=7)
    last, scene.roster = scene.roster, RosterError("the front cannot be asked")
    with pytest.raises(RosterError, match="cannot be asked"):
        scene.place.dial(Until())
    scene.roster = last
    scene.place.dial(Until())
    scene.roster = RosterError("the front cannot be asked")
    with caplog.at_level(logging.WARNING, "tsqp.workers"):
        assert scene.dialled() == [(WHOLE, name(1))]
    assert "the roster of epoch 7 is used" in caplog.text
    scene.now(member(2, WHOLE))
    assert scene.dialled() == [(WHOLE, name(2))]


def test_a_roster_is_held_against_what_is_known_each_time_it_is_used() -> None:
    scene, refused = Scene(member(1, WHOLE)), list[str]()

    def check(roster: Roster) -> None:
        if refused:
            raise RosterError(refused[0])

    place = RosterPlace(parse_roster_address("roster:///x"), scene.find, scene.connect, lambda: CONFIG, check=check)
    place.dial(Until())
    scene.roster = RosterError("the front cannot be asked")
    place.dial(Until())
    refused.append("it is a worker by now")
    with pytest.raises(RosterError, match="it is a worker by now"):
        place.dial(Until())
    assert len(scene.asked) == 2


def test_a_member_that_fails_in_any_way_we_know_of_is_passed_over() -> None:
    scene = Scene(member(1, WHOLE), member(2, WHOLE))
    scene.down = {name(1): TsqpError("whatever it is")}
    assert scene.dialled() == [(WHOLE, name(2))]
