"""Several sessions that are asked as if they were one: what each is sent, what is made of what they answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import inf
from typing import Any

import msgspec
import numpy as np
import pytest

from tsqp.checkpoint import open_checkpoint
from tsqp.config.groups import GroupKey, linear_groups
from tsqp.config.shard import Shard, said
from tsqp.config.tiling import Tiling
from tsqp.errors import (
    ArenaFull,
    ChannelClosed,
    ChannelError,
    DeadlineExceeded,
    ProductMismatch,
    ProtocolError,
    ReplyShapeError,
    WorkerFailed,
    WorkerLost,
)
from tsqp.trusted.remote import team as teams
from tsqp.trusted.remote.members import Member
from tsqp.trusted.remote.session import WorkerSession
from tsqp.trusted.remote.team import SHARE_ROWS, SLOW_S, Team, TeamReply
from tsqp.trusted.remote.usual_time import ENOUGH, FIRST_S, TIMES
from tsqp.trusted.stats import Stats
from tsqp.trusted.trace import Trace
from tsqp.wire.channel import Frames, SlotsByReserve
from tsqp.wire.codec import decode_to_worker, encode
from tsqp.wire.messages import PROTOCOL_VERSION, Done, Failed, GroupShape, Hello, Product, Welcome
from tsqp.wire.slot import Slot

CHECKPOINT = open_checkpoint("synthetic:tiny")
CONFIG = CHECKPOINT.config
FINGERPRINT = CHECKPOINT.fingerprint()
GROUPS = linear_groups(CONFIG)
KEY: GroupKey = ("qkv", 0)
INNER, OUTER = GROUPS["qkv"].in_features, GROUPS["qkv"].out_features
SOON_S = 0.01  # no call of a worker that is well takes longer
ABOUT_S = 0.004  # a few looks at whoever is waited for, of a millisecond each
MOST_LOOKS = 50_000  # who looks more often than that would never end

Array = np.ndarray[Any, np.dtype[Any]]


def product(x: Array, begin: int, stop: int) -> Array:
    """Some function of each row and each column: uint32 (R, stop - begin)."""
    return (x[:, :1].astype(np.int64) * 7 + np.arange(begin, stop)).astype(np.uint32)


class Clock:
    """Seconds that pass when somebody waits for a channel, and a microsecond with each look at one."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Scripted(SlotsByReserve):
    """A channel to a worker of a shard. It scribbles over what it was sent.

    It takes ``takes_s`` for each call, one after another, and ``holds`` what it has to say.
    """

    transport = "mem"

    def __init__(self, shard: Shard, number: int, clock: Clock) -> None:
        self.shard, self.address, self._clock = shard, f"mem:{number}", clock
        self.takes_s = 0.0
        self.looks = 0
        self.busy_ns = 0  # what it says of each call
        self.sent: list[bytes] = []  # the payload of each call
        self.slots: list[Slot] = []
        self.payloads: list[bytearray] = []  # memory of replies, which this side can still change
        self.holds = self.closed = self.full = False
        self.raises: ChannelError | None = None
        self.answer: Any = None  # of a call: Frames, in the place of the right one
        self._held: deque[Frames] = deque()
        self._replies: deque[tuple[float, Frames]] = deque()  # and when they come

    def reserve(self, size: int) -> memoryview:
        return memoryview(bytearray(size))

    def slot(self, size: int, reply_bytes: int) -> Slot:
        if self.full:
            raise ArenaFull("no room for a tensor")
        self.slots.append(super().slot(size, reply_bytes))
        return self.slots[-1]

    def send(self, frames: Frames, reply_bytes: int = 0) -> None:
        if self.raises is not None:
            raise self.raises
        message = decode_to_worker(frames.control)
        if isinstance(message, Hello):
            groups = tuple(GroupShape(g.name, g.in_features, self.shard.width(g)) for g in self.shard.groups(CONFIG))
            welcome = Welcome(PROTOCOL_VERSION, FINGERPRINT, groups, "cpu", "float32", said(self.shard, CONFIG))
            self._replies.append((-inf, Frames(encode(welcome))))
            return
        assert isinstance(message, Product)
        (memory,) = frames.tensors
        self.sent.append(bytes(memory))
        x = np.frombuffer(self.sent[-1], np.uint32).reshape(message.rows, -1)
        memory[:] = b"\xff" * memory.nbytes  # what was sent is the worker's to change
        y = product(x, *self.shard.columns(GROUPS[message.group].out_features))
        self.payloads.append(bytearray(y.tobytes()))
        reply = Frames(encode(Done(message.id, self.busy_ns)), (memoryview(self.payloads[-1]),))
        reply = reply if self.answer is None else self.answer(message)
        if self.holds:
            self._held.append(reply)
        else:
            free_s = max(self._clock.now, self._replies[-1][0] if self._replies else -inf)
            self._replies.append((free_s + self.takes_s, reply))

    def let_go(self, after_s: float = 0.0) -> None:
        """What was held comes."""
        self._replies += [(self._clock.now + after_s, reply) for reply in self._held]
        self._held.clear()
        self.holds = False

    def arrived(self, within_s: float) -> bool:
        if self.raises is not None:
            raise self.raises
        self.looks += 1
        assert self.looks < MOST_LOOKS
        due_s = self._replies[0][0] if self._replies else inf
        if due_s <= self._clock.now + within_s:
            self._clock.now = max(self._clock.now, due_s)
            return True
        self._clock.now += max(within_s, 1e-6)
        return False

    def receive(self, deadline_s: float) -> Frames:
        return self._replies.popleft()[1]

    def close(self) -> None:
        self.closed = True


class Scene:
    """A team over scripted channels, one for each shard."""

    def __init__(self, *shards: str, deadline_s: float = 5.0, takes_s: Sequence[float] = ()) -> None:
        self.clock = Clock()
        self.lines = [Scripted(Shard.parse(text), number, self.clock) for number, text in enumerate(shards)]
        for line, seconds in zip(self.lines, takes_s, strict=bool(takes_s)):
            line.takes_s = seconds
        lines = Stats()
        members = [
            Member(
                WorkerSession(
                    line,
                    CONFIG,
                    FINGERPRINT,
                    wire_dtype="float32",
                    dtype="float32",
                    stats=lines,
                    deadline_s=deadline_s,
                    shard=line.shard,
                ),
                line.shard,
                f"worker {number}",
            )
            for number, line in enumerate(self.lines)
        ]
        tiling = Tiling([line.shard for line in self.lines], CONFIG)
        self.team = Team(members, tiling, Stats(), deadline_s, self.clock)

    def slot(self, rows: int, key: GroupKey = KEY) -> Slot:
        group = GROUPS[key[0]]
        return self.team.slot(rows * group.in_features * 4, rows * group.out_features * 4)

    def ask(
        self, rows: int = 3, seed: int = 1, slot: Slot | None = None, key: GroupKey = KEY
    ) -> tuple[Array, TeamReply]:
        """A call with random rows, and those."""
        slot = slot or self.slot(rows, key)
        x = np.random.default_rng(seed).integers(0, 2**31 - 1, (rows, GROUPS[key[0]].in_features), dtype=np.uint32)
        slot.tensor[:] = x.tobytes()
        return x, self.team.ask("linear", Product(self.team.next_id(), *key, rows, 4), slot)

    def took_s(self, rows: int = 3, key: GroupKey = KEY) -> float:
        """Seconds that a call takes, whose product is right."""
        began = self.clock.now
        x, reply = self.ask(rows, key=key)
        assert np.array_equal(answered(reply), product(x, 0, GROUPS[key[0]].out_features))
        return self.clock.now - began

    def ping_s(self) -> float:
        """Seconds that a ping takes."""
        began = self.clock.now
        self.team.ping()
        assert self.team.stats.heard_s == self.clock.now
        return self.clock.now - began

    def sent(self) -> list[int]:
        """How many calls each line was sent."""
        return [len(line.sent) for line in self.lines]

    def later(self) -> None:
        """Nobody is called slow any longer."""
        self.clock.now += SLOW_S + 1

    def names(self) -> list[str]:
        return [member.name for member in self.team.members]


def answered(reply: TeamReply) -> Array:
    return np.frombuffer(reply.wait(), np.uint32).reshape(reply.call.rows, GROUPS[reply.call.group].out_features)


def about(seconds: float) -> Any:
    return pytest.approx(seconds, abs=ABOUT_S)


HALVES = "0..3/0..1of2", "0..3/1..2of2"
REPLICAS = "0..3", "0..3"
PLACEMENTS = {
    "one": ["0..3"],
    "columns": HALVES,
    "layers": ["0..1", "1..3"],
    "replicas": REPLICAS,
    "uneven, with replicas": ["0..3/0..1of5", "0..3/1..4of5", "0..3/4..5of5", "0..3/1..4of5", "0..3/1..4of5"],
}


# For a call of KEY: those who are always asked, and those who have a share of many rows.
ASKED: dict[str, tuple[list[int], list[int]]] = {
    "one": ([0], []),
    "columns": ([0, 1], []),
    "layers": ([0], []),
    "replicas": ([0], [1]),
    "uneven, with replicas": ([0, 1, 2], [3, 4]),
}


@pytest.mark.parametrize("rows", [1, 3, 2 * SHARE_ROWS, 3 * SHARE_ROWS + 5])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_slices_and_shares_of_rows_are_put_together(placement: str, rows: int) -> None:
    scene = Scene(*PLACEMENTS[placement])
    for seed in range(2):
        x, reply = scene.ask(rows, seed)
        assert np.array_equal(answered(reply), product(x, 0, OUTER))
    one_of_each, replicas = ASKED[placement]
    sent = {number for number, line in enumerate(scene.lines) if line.sent}
    assert sent == {*one_of_each, *replicas[: max(rows // SHARE_ROWS, 1) - 1]}


@pytest.mark.parametrize(
    ("rows", "shares"), [(1, [1]), (2 * SHARE_ROWS - 1, [127]), (2 * SHARE_ROWS, [64, 64]), (1000, [333, 333, 334])]
)
def test_rows_are_shared_among_replicas_where_there_are_enough(rows: int, shares: list[int]) -> None:
    scene = Scene("0..3", "0..3", "0..3")
    x, reply = scene.ask(rows)
    assert [len(sent) // (4 * INNER) for line in scene.lines for sent in line.sent] == shares
    assert b"".join(sent for line in scene.lines for sent in line.sent) == x.tobytes()
    assert np.array_equal(answered(reply), product(x, 0, OUTER))


def test_each_member_of_a_layer_is_sent_the_same_rows_and_others_nothing() -> None:
    scene = Scene("0..1/0..1of2", "0..1/1..2of2", "1..3")
    x, reply = scene.ask()
    reply.wait()
    assert [line.sent for line in scene.lines] == [[x.tobytes()], [x.tobytes()], []]


def test_calls_under_way_together_go_to_different_replicas() -> None:
    scene = Scene(*REPLICAS)
    asked = [scene.ask(2, seed) for seed in range(4)]
    assert [len(line.sent) for line in scene.lines] == [2, 2]
    for x, reply in reversed(asked):
        assert np.array_equal(answered(reply), product(x, 0, OUTER))


def test_a_reply_is_read_once_into_private_memory() -> None:
    scene = Scene(*HALVES)
    x, reply = scene.ask()
    found = answered(reply)
    for line in scene.lines:
        line.payloads[-1][:] = bytes(len(line.payloads[-1]))
    assert np.array_equal(found, product(x, 0, OUTER))


def test_memory_is_used_again_by_the_next_call() -> None:
    scene = Scene(*HALVES)
    slot = scene.slot(3)
    for seed in range(5):
        x, reply = scene.ask(3, seed, slot)
        assert np.array_equal(answered(reply), product(x, 0, OUTER))
    assert [len(line.slots) for line in scene.lines] == [1, 1]


def test_the_time_at_the_worker_is_that_of_the_slowest() -> None:
    scene = Scene(*HALVES, takes_s=[0.02, 0.02])
    scene.lines[0].busy_ns, scene.lines[1].busy_ns = 5_000_000, 3_000_000
    scene.took_s()
    assert scene.team.stats.calls["linear"].worker_s == pytest.approx(0.005)
    scene.lines[1].busy_ns = 10**12  # nobody has computed for longer than the call was under way
    scene.took_s()
    assert scene.team.stats.calls["linear"].worker_s == pytest.approx(0.005 + 0.02, abs=1e-4)


def test_a_call_is_counted_once_and_bytes_are_those_of_all() -> None:
    scene = Scene(*HALVES, HALVES[0])
    stats = scene.team.stats
    trace = stats.trace = Trace()
    _, reply = scene.ask(3)
    row = stats.calls["linear"]
    assert row.count == 1
    assert 2 * 3 * INNER * 4 < row.bytes_sent < 2 * 3 * INNER * 4 + 200  # with two control frames
    reply.wait()
    assert row.bytes_received == 3 * OUTER * 4
    assert 0.0 <= row.worker_s <= row.rpc_s
    assert [span.name for span in trace.spans if span.track == "call"] == ["qkv"]


# Who is slow


def stalled(*more: str) -> tuple[Scene, Slot]:
    """One of two replicas of the second half owes a reply, which the other has given; ``more``: further replicas."""
    scene = Scene(*HALVES, HALVES[1], *more)
    scene.lines[1].holds = True
    slot = scene.slot(3)
    x, reply = scene.ask(3, slot=slot)
    assert np.array_equal(answered(reply), product(x, 0, OUTER))
    assert scene.team.stats.hedged == 1
    return scene, slot


def test_a_slice_that_is_late_is_asked_for_again_with_the_same_rows() -> None:
    """The same bytes, although the first one has scribbled over its copy."""
    scene, _ = stalled()
    assert scene.lines[1].sent == scene.lines[2].sent
    assert scene.sent() == [1, 1, 1]
    assert 3 * 3 * INNER * 4 < scene.team.stats.calls["linear"].bytes_sent < 3 * 3 * INNER * 4 + 300


def test_a_late_reply_is_dropped_when_it_comes_and_its_session_goes_on() -> None:
    scene, slot = stalled()
    late = scene.team.members[1]
    assert (late.name, len(late.late)) == ("worker 1", 1)
    for seed in range(3):  # who owes a reply is asked last
        x, reply = scene.ask(3, seed, slot)
        assert np.array_equal(answered(reply), product(x, 0, OUTER))
    assert len(scene.lines[1].sent) == 1
    scene.lines[1].let_go()
    scene.later()
    asked = [scene.ask(3, seed) for seed in range(2)]  # two at once, so that both are asked
    assert len(scene.lines[1].sent) == 2
    assert not late.late
    for x, reply in asked:
        assert np.array_equal(answered(reply), product(x, 0, OUTER))


def test_memory_of_a_call_that_is_late_is_left_to_it() -> None:
    scene, slot = stalled()
    (late,) = scene.team.members[1].late
    scene.lines[1].let_go()
    scene.later()
    for seed in range(3):
        x, reply = scene.ask(3, seed, slot)
        assert np.array_equal(answered(reply), product(x, 0, OUTER))
    assert len(scene.lines[1].sent) == 4
    first, second = scene.lines[1].slots  # one call's alone, and that of all after it
    assert late.slot is first is not second


def test_a_late_reply_has_to_be_of_the_right_size_too() -> None:
    scene = Scene(*REPLICAS)
    scene.lines[0].holds = True
    scene.lines[0].answer = lambda call: Frames(encode(Done(call.id)), (memoryview(bytes(8)),))
    scene.took_s()
    scene.lines[0].let_go()
    with pytest.raises(ReplyShapeError, match=r"^mem:0: ") as caught:
        scene.ask()
    assert caught.value.worker == "worker 0"


def test_who_owes_a_reply_for_too_long_is_lost() -> None:
    scene, _ = stalled()
    scene.clock.now += 1000.0
    scene.took_s()
    assert scene.names() == ["worker 0", "worker 2"]
    assert scene.lines[1].closed


def test_many_rows_are_shared_among_those_that_owe_nothing_and_were_not_slow() -> None:
    scene, _ = stalled()
    stalls = scene.team.members[1]
    stalls.slow_at_s = -inf
    scene.took_s(4 * SHARE_ROWS)  # it owes a reply
    assert scene.sent() == [2, 1, 2]
    stalls.slow_at_s = scene.clock.now
    scene.lines[1].let_go()
    for _ in range(2):
        scene.took_s(4 * SHARE_ROWS)  # it was slow
    assert (stalls.late, scene.sent()) == ([], [4, 1, 4])
    scene.later()
    scene.took_s(4 * SHARE_ROWS)
    assert scene.sent() == [5, 2, 5]


def test_whoever_waits_neither_looks_all_the_time_nor_looks_away_for_long() -> None:
    scene = Scene("0..3", takes_s=[0.5])
    assert scene.took_s() == about(0.5)
    assert scene.lines[0].looks <= 3
    scene = Scene(*REPLICAS, takes_s=[0.5, 0.5])
    assert scene.took_s() == about(0.5)
    assert scene.lines[0].looks <= 3
    scene.lines[0].holds = True
    assert scene.took_s() == about(FIRST_S + 0.5)  # both are looked at, in turn


def test_the_time_that_is_usual_is_that_of_who_has_answered() -> None:
    """Not with the wait for another before it."""
    scene = Scene(*REPLICAS, takes_s=[SOON_S, SOON_S])
    for _ in range(ENOUGH):
        scene.lines[0].holds = True
        assert scene.took_s() == about(FIRST_S + SOON_S)
        scene.lines[0].let_go()
        scene.later()
    scene.lines[0].holds = True
    assert scene.took_s() == about(TIMES * SOON_S + SOON_S)


SMALL: GroupKey = ("o", 0)


@pytest.mark.parametrize(
    ("quick", "slow"), [((1, KEY), (SHARE_ROWS, KEY)), ((3, SMALL), (3, KEY))], ids=["rows", "groups"]
)
def test_what_is_usual_is_known_for_each_group_and_number_of_rows(
    quick: tuple[int, GroupKey], slow: tuple[int, GroupKey]
) -> None:
    scene = Scene(*REPLICAS)
    for seconds, asked in [(SOON_S, quick), (2.0, slow)]:
        scene.lines[0].takes_s, scene.lines[1].takes_s = seconds, 2 * seconds  # so that the first one is asked first
        for _ in range(4 * ENOUGH):  # the first ones of the slow kind are hedged, since nothing is known of it
            scene.took_s(*asked)
            scene.later()
    hedged = scene.team.stats.hedged
    scene.took_s(*slow)
    assert scene.team.stats.hedged == hedged
    scene.later()
    scene.lines[0].holds, scene.lines[1].takes_s = True, SOON_S
    assert scene.took_s(*quick) == about(TIMES * SOON_S + SOON_S)


def test_each_of_several_stalled_replicas_costs_a_wait_that_is_usual() -> None:
    scene = Scene("0..3", "0..3", "0..3", "0..3")
    for line in scene.lines[:3]:
        line.holds = True
    scene.lines[3].takes_s = SOON_S
    assert scene.took_s() == pytest.approx(3 * FIRST_S + SOON_S, abs=4 * ABOUT_S)
    assert (scene.team.stats.hedged, scene.sent()) == (3, [1, 1, 1, 1])


def test_who_owes_a_reply_is_not_asked_while_another_works() -> None:
    scene = Scene(*REPLICAS)
    scene.lines[0].holds = True
    scene.took_s()
    scene.lines[1].takes_s = 3.0
    assert scene.took_s() == about(3.0)
    assert (scene.team.stats.hedged, scene.sent()) == (1, [1, 2])


def test_who_owes_nothing_any_longer_is_asked_at_once() -> None:
    scene = Scene(*REPLICAS)
    scene.lines[0].holds = True
    scene.took_s()
    scene.lines[0].let_go(after_s=2.0)
    scene.lines[1].holds = True
    assert scene.took_s() == about(2.0)
    assert (scene.team.stats.hedged, scene.sent()) == (2, [2, 2])


def test_a_replica_that_answers_when_another_has_just_been_asked_is_asked_last() -> None:
    scene = Scene(*REPLICAS, takes_s=[FIRST_S + SOON_S / 2, SOON_S])
    assert scene.took_s() == about(FIRST_S + SOON_S / 2)
    scene.clock.now += SOON_S  # the other has answered too
    for _ in range(100):
        assert scene.took_s() == about(SOON_S)
    assert scene.lines[0].sent[1:] == []
    scene.later()
    assert scene.took_s() == about(TIMES * SOON_S + SOON_S)  # patience has not grown
    assert (scene.team.stats.hedged, len(scene.lines[0].sent)) == (2, 2)


def test_a_replica_that_is_just_quick_enough_is_not_asked_first_and_teaches_nobody_patience() -> None:
    scene = Scene(*REPLICAS, takes_s=[FIRST_S / 2, SOON_S])
    for _ in range(100):
        scene.took_s()
    assert (scene.team.stats.hedged, scene.sent()) == (0, [ENOUGH, 100 - ENOUGH])
    scene.lines[1].holds, scene.lines[0].takes_s = True, SOON_S
    assert scene.took_s() == about(TIMES * SOON_S + SOON_S)


def test_who_owes_a_reply_comes_after_who_has_more_under_way() -> None:
    scene = Scene(*REPLICAS)
    scene.lines[0].holds = True
    scene.took_s()
    scene.team.members[0].slow_at_s = -inf  # that was long ago
    asked = [scene.ask(3, seed) for seed in range(3)]
    assert scene.sent() == [1, 4]
    for x, reply in asked:
        assert np.array_equal(answered(reply), product(x, 0, OUTER))


# Pings


def test_a_ping_waits_for_a_silent_replica_as_long_as_is_usual_and_once() -> None:
    scene = Scene(*HALVES, HALVES[1], takes_s=[SOON_S] * 3)
    scene.lines[1].holds = True
    assert scene.ping_s() == about(FIRST_S)
    assert scene.sent() == [1, 1, 1]
    assert scene.ping_s() == about(SOON_S)
    assert scene.sent() == [2, 1, 2]
    assert scene.took_s() == about(SOON_S)  # who owes it is asked last
    assert scene.sent() == [3, 1, 3]
    scene.lines[1].let_go()
    assert scene.ping_s() == about(SOON_S)
    assert scene.sent() == [4, 2, 4]


def test_what_is_usual_of_pings_is_what_is_of_their_product() -> None:
    scene = Scene(*REPLICAS, takes_s=[SOON_S, SOON_S])
    for _ in range(2 * ENOUGH):
        scene.took_s(1, SMALL)
    scene.lines[0].holds = True
    assert scene.ping_s() == about(TIMES * SOON_S)


def test_a_ping_is_over_when_all_have_answered() -> None:
    scene = Scene(*HALVES, *HALVES, takes_s=[SOON_S, SOON_S, 0.5, SOON_S])
    assert scene.ping_s() == about(0.5)


def test_of_each_shard_somebody_has_to_answer_a_ping() -> None:
    scene = Scene(*REPLICAS)
    scene.lines[0].holds, scene.lines[1].takes_s = True, 3.0
    assert scene.ping_s() == about(3.0)


def test_a_ping_of_a_shard_whose_workers_all_owe_replies_waits_for_one_of_those() -> None:
    scene = Scene("0..3", "0..3", "0..3")
    scene.lines[0].holds = scene.lines[1].holds = True
    scene.took_s()
    scene.lines[2].raises = WorkerLost("went away")
    scene.lines[1].let_go(after_s=0.5)
    assert scene.ping_s() == about(0.5)
    assert scene.names() == ["worker 0", "worker 1"]
    assert scene.sent()[:2] == [1, 1]  # no ping beside it


@pytest.mark.parametrize("shards", [HALVES, REPLICAS])
def test_a_ping_that_nobody_answers_ends_the_team_at_the_deadline(shards: tuple[str, ...]) -> None:
    scene = Scene(*shards, deadline_s=2.0)
    began = scene.clock.now
    for line in scene.lines:
        line.holds = True
    with pytest.raises(DeadlineExceeded, match=r"^mem:[01]: the worker sent nothing before the deadline"):
        scene.team.ping()
    assert scene.clock.now - began == about(2.0)
    assert all(line.closed for line in scene.lines)


@pytest.mark.parametrize("shards", [HALVES, (*HALVES, HALVES[1])])
def test_a_part_that_nobody_answers_ends_the_team_at_the_deadline(shards: tuple[str, ...]) -> None:
    scene = Scene(*shards, deadline_s=0.02)
    for line in scene.lines[1:]:
        line.holds = True
    _, reply = scene.ask()
    with pytest.raises(DeadlineExceeded) as caught:
        reply.wait()
    assert caught.value.worker in ("worker 1", "worker 2")
    assert all(line.closed for line in scene.lines)


def test_nobody_is_asked_again_before_it_is_time() -> None:
    scene = Scene(*REPLICAS)
    for seed in range(20):
        scene.ask(3, seed)[1].wait()
    assert scene.team.stats.hedged == 0


# Who is lost


LOSSES = [WorkerLost("went away"), DeadlineExceeded("takes no more calls")]


@pytest.mark.parametrize("error", LOSSES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("moment", ["before", "between"])
def test_a_replica_is_asked_for_what_one_that_is_lost_was_sent(error: ChannelError, moment: str) -> None:
    scene = Scene(*HALVES, HALVES[1])
    if moment == "before":
        scene.lines[1].raises = error
    x, reply = scene.ask()
    if moment == "between":
        scene.lines[1].raises = error
        scene.lines[1]._replies.clear()
    assert np.array_equal(answered(reply), product(x, 0, OUTER))
    assert scene.names() == ["worker 0", "worker 2"]
    assert scene.lines[2].sent == [x.tobytes()]
    assert error.worker == "worker 1"
    assert scene.team.ended is None


def test_who_owes_replies_and_has_no_memory_left_for_another_call_is_lost() -> None:
    scene = Scene("0..3", "0..3", "0..3")
    scene.lines[0].holds = scene.lines[1].holds = True
    scene.took_s()  # both owe a reply
    scene.lines[0].full = True
    scene.lines[1].let_go(after_s=0.5)
    scene.lines[2].raises = WorkerLost("went away")
    assert scene.took_s() == about(0.5)
    assert scene.names() == ["worker 1"]
    assert scene.team.ended is None


def test_without_a_reply_that_is_owed_full_memory_is_this_sides_own_fault() -> None:
    scene = Scene(*REPLICAS)
    scene.lines[0].full = True
    with pytest.raises(ArenaFull):
        scene.ask()
    assert isinstance(scene.team.ended, ArenaFull)
    assert scene.lines[1].closed


def test_a_worker_that_fails_is_one_that_is_lost() -> None:
    scene = Scene(*REPLICAS)
    scene.lines[0].answer = lambda call: Frames(encode(Failed(call.id, "no memory")))
    x, reply = scene.ask()
    assert np.array_equal(answered(reply), product(x, 0, OUTER))
    assert scene.names() == ["worker 1"]
    scene.lines[1].answer = scene.lines[0].answer
    with pytest.raises(WorkerFailed, match="mem:1 failed: no memory"):
        scene.ask()[1].wait()


def test_the_last_of_its_shard_ends_the_team() -> None:
    scene = Scene(*HALVES, HALVES[1])
    scene.lines[1].raises = scene.lines[2].raises = WorkerLost("went away")
    with pytest.raises(WorkerLost) as caught:
        scene.ask()
    assert all(line.closed for line in scene.lines)
    for call in (scene.ask, scene.team.ping):
        with pytest.raises(WorkerLost) as again:
            call()
        assert again.value is caught.value


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (lambda call: Frames(encode(Done(call.id)), (memoryview(bytes(8)),)), ReplyShapeError),
        (lambda call: Frames(encode(Done(call.id + 7))), ProtocolError),
    ],
    ids=["another size", "another call"],
)
def test_a_reply_that_is_not_what_it_has_to_be_ends_the_team(answer: Any, expected: type[ChannelError]) -> None:
    """A replica makes good what is lost, and not what is wrong."""
    scene = Scene(*REPLICAS)
    scene.lines[0].answer = answer
    with pytest.raises(expected, match=r"^mem:0: ") as caught:
        scene.ask()[1].wait()
    assert caught.value.worker == "worker 0"
    assert scene.lines[1].closed


# Failed checks


@pytest.mark.parametrize(("row", "part", "name"), [(0, 0, 0), (99, 0, 0), (99, 1, 1), (100, 1, 2), (199, 1, 2)])
def test_a_failed_check_is_about_who_has_sent_that_part(row: int, part: int, name: int) -> None:
    scene = Scene(*HALVES, HALVES[1])
    scene.ask(200)[1].wait()
    error = ProductMismatch("the worker's product is wrong", row, part)
    scene.team.fail(error)
    assert (error.worker, str(error)) == (f"worker {name}", f"mem:{name}: the worker's product is wrong")
    assert scene.team.ended is error
    assert all(line.closed for line in scene.lines)


def test_it_is_about_the_replica_whose_answer_counted() -> None:
    scene, _ = stalled()
    scene.team.fail(error := ProductMismatch("the worker's product is wrong", 1, 1))
    assert error.worker == "worker 2"


@pytest.mark.parametrize("error", [ProductMismatch("products of pads are wrong"), ChannelClosed("given up")])
def test_an_error_that_is_about_no_worker_names_none(error: ChannelError) -> None:
    scene = Scene(*HALVES)
    scene.ask()[1].wait()
    scene.team.fail(error)
    assert error.worker is None


def test_a_product_that_is_given_up_is_over_with_its_team() -> None:
    scene = Scene(*HALVES)
    _, reply = scene.ask()
    scene.team.fail(ChannelClosed("a product was given up"))
    for call in (reply.wait, scene.ask, lambda: scene.slot(3)):
        with pytest.raises(ChannelClosed, match="given up"):
            call()
    assert all(line.closed for line in scene.lines)


def test_closing_twice_is_allowed() -> None:
    scene = Scene(*HALVES)
    scene.team.close()
    scene.team.close()
    with pytest.raises(ChannelClosed):
        scene.ask()
    assert all(line.closed for line in scene.lines)


def test_who_they_are_is_said_in_a_few_words() -> None:
    scene = Scene(*(f"0..3/{part}..{part + 1}of6" for part in range(6)))
    assert scene.team.address == "mem:0, mem:1, mem:2, mem:3 and 2 more"
    assert (scene.team.transport, scene.team.welcome.device) == ("mem", "cpu")
    assert msgspec.structs.asdict(scene.team.welcome)["dtype"] == "float32"
    assert teams.NAMED == 4
