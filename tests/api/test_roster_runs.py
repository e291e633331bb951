"""Runs whose workers a roster names: who is asked after a loss or a cheat, and what a front that is gone costs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from tests.api import teams
from tests.api.mortal import MODEL, PARAMS, PROMPTS, MortalRecorder, answers, living
from tests.commands import LIMIT_S
from tests.families import random_tokens
from tests.fronts import RosterWriter, front_process, front_thread, not_utf8
from tests.trusted.guard import hostile
from tests.trusted.guard.hostile import edited, serve, serving
from tests.trusted.guard.scan import shared_pads
from tests.trusted.step_runs import RecordingWorker
from tsqp import LLM, AsyncLLM, Completion, SamplingParams, WorkerConfig
from tsqp.api import async_llm, dialling, parties, private_sessions
from tsqp.api.private_sessions import PrivateSessions
from tsqp.api.roster_place import RosterPlace
from tsqp.api.worker_state import WorkerState
from tsqp.errors import WorkerLost
from tsqp.trusted.private import PrivateModel
from tsqp.trusted.remote.team import Team
from tsqp.wire.channel import Arrival, Channel
from tsqp.wire.roster import Member, roster_document
from tsqp.wire.transport import connect, listen
from tsqp.wire.transport.keys import KeyFiles, KeyPair, WorkerKeys, create_keys, load_public

WHOLE = "0..3"  # of a model of two layers
PROMPT = random_tokens(21)
SOME = SamplingParams(max_tokens=6, ignore_eos=True)


class Cheat(MortalRecorder):
    """Answers one product falsely, and is honest before and after."""

    def __init__(self, at: int) -> None:
        RecordingWorker.__init__(self, MODEL, edited(hostile.flip_low_bit), at)
        self.deaths, self.asked = [], 0


@pytest.fixture(scope="module")
def undisturbed() -> list[Completion]:
    with living(MortalRecorder()) as address, LLM(MODEL, protection="verified", worker=address) as llm:
        return answers(llm)


@pytest.fixture
def roster(tmp_path: Path) -> RosterWriter:
    return RosterWriter(tmp_path / "roster.json")


@pytest.fixture(scope="module")
def own_key(tmp_path_factory: pytest.TempPathFactory) -> KeyFiles:
    return create_keys(tmp_path_factory.mktemp("keys"), "me")


@contextmanager
def keyed(worker: RecordingWorker, client: KeyFiles) -> Iterator[Member]:
    """A worker over tcp with a key of its own, as a roster names it."""
    own = KeyPair(*zmq.curve_keypair())
    keys = WorkerKeys(own, frozenset({load_public(client.public)}))
    with closing(listen("tcp://127.0.0.1:0", security=keys)) as listener:
        thread = threading.Thread(target=worker.serve, args=(listener,), daemon=True)
        thread.start()
        try:
            yield Member(listener.address, WHOLE, own.public.decode())
        finally:
            listener.interrupt()
            thread.join(LIMIT_S)


def state_of(llm: LLM) -> WorkerState:
    state = llm.worker_state
    assert state is not None
    return state


def test_after_a_loss_the_roster_is_read_again(roster: RosterWriter, undisturbed: list[Completion]) -> None:
    first, second = MortalRecorder([40]), MortalRecorder()
    with living(first) as one, living(second) as two:
        roster.names(Member(one, WHOLE))
        with LLM(MODEL, worker=roster.address) as llm:
            roster.names(Member(two, WHOLE))
            assert answers(llm) == undisturbed
            state = state_of(llm)
            assert (state.losses, state.address, state.expelled) == (1, two, {})
    assert not shared_pads(first.rows(np.uint32) + second.rows(np.uint32))


def test_a_front_that_is_gone_stops_nobody_and_one_that_is_back_is_asked(
    roster: RosterWriter, undisturbed: list[Completion]
) -> None:
    first, second = MortalRecorder([40, 60]), MortalRecorder()
    with living(first) as one, living(second) as two:
        roster.names(Member(one, WHOLE))
        with front_process(roster.path) as (front, address):
            llm = LLM(MODEL, worker=address)
            front.kill()
            front.wait()
        with closing(llm):
            llm.generate("hello", SamplingParams(max_tokens=2))
            assert state_of(llm).losses == 0
            first.deaths = [first.asked + 20]
            assert answers(llm) == undisturbed  # the last roster is good enough
            assert (state_of(llm).losses, state_of(llm).address) == (1, one)
            roster.names(Member(two, WHOLE))
            with front_process(roster.path, listen=address.removeprefix("roster+")):
                first.deaths = [first.asked + 20]
                assert answers(llm) == undisturbed
                assert (state_of(llm).losses, state_of(llm).address) == (2, two)


def test_a_front_that_turns_hostile_while_nobody_asks_leaves_the_last_roster(
    undisturbed: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_llm, "LOOK_S", 0.01)
    hostile, asked = threading.Event(), list[bytes]()
    with living(MortalRecorder()) as one:
        good = roster_document(1, [Member(one, WHOLE)])

        def document() -> bytes:
            if hostile.is_set():
                asked.append(not_utf8(good))
                return asked[-1]
            return good

        async def run(llm: LLM) -> None:
            async with AsyncLLM(llm) as model:
                hostile.set()
                assert llm.session is not None
                llm.session.fail(WorkerLost("went away"))
                while state_of(llm).reconnects == 0:
                    await asyncio.sleep(0.001)
                assert await model.generate(PROMPTS[0], PARAMS[0]) == undisturbed[0]

        with front_thread(document) as address:
            asyncio.run(asyncio.wait_for(run(LLM(MODEL, protection="verified", worker=address)), LIMIT_S))
    assert asked


def test_a_worker_that_cheats_is_expelled_by_its_key(
    roster: RosterWriter, own_key: KeyFiles, undisturbed: list[Completion]
) -> None:
    cheat, honest = Cheat(50), MortalRecorder()
    with keyed(cheat, own_key) as false, keyed(honest, own_key) as true:
        roster.names(false)
        with LLM(MODEL, worker=WorkerConfig(roster.address, key=own_key.secret)) as llm:
            roster.names(true)  # somebody has put another one in its place
            assert answers(llm) == undisturbed
            assert list(state_of(llm).expelled) == [false.key]
            assert (state_of(llm).failed_checks, state_of(llm).address) == (1, true.address)
    assert cheat.products == cheat.attacked + 1  # type: ignore[operator]


LEFT, RIGHT = "0..3/0..1of2", "0..3/1..2of2"


@pytest.fixture(scope="module")
def alone() -> tuple[int, ...]:
    """What a run with one worker answers, of the model that teams have."""
    with serve(teams.MODEL) as (_, address), LLM(teams.MODEL, protection="verified", worker=address) as llm:
        return tuple(llm.generate(PROMPT, SOME)[0].token_ids)


@contextmanager
def team(*workers: teams.TeamWorker) -> Iterator[list[str]]:
    """Their addresses."""
    with ExitStack() as stack:
        yield [stack.enter_context(serving(worker, "shm")) for worker in workers]


def test_the_slice_of_one_that_cheats_goes_to_its_replica(roster: RosterWriter, alone: tuple[int, ...]) -> None:
    cheat = teams.TeamWorker(teams.store_of(LEFT), edited(hostile.flip_low_bit), 20)
    replica, right = (teams.TeamWorker(teams.store_of(shard)) for shard in (LEFT, RIGHT))
    with team(cheat, right, replica) as (false, other, true):
        roster.names(Member(false, LEFT), Member(other, RIGHT))
        with LLM(teams.MODEL, worker=roster.address) as llm:
            roster.names(Member(false, LEFT), Member(other, RIGHT), Member(true, LEFT))
            assert llm.generate(PROMPT, SOME)[0].token_ids == alone
            assert list(state_of(llm).expelled) == [false]
            assert (state_of(llm).failed_checks, state_of(llm).reconnects, state_of(llm).state) == (1, 1, "ready")
            assert replica.products > 0
            assert cheat.products == cheat.attacked + 1  # type: ignore[operator]


def test_the_workers_of_a_team_share_what_limits_leave(
    roster: RosterWriter, alone: tuple[int, ...], limits: dict[str, str]
) -> None:
    limits["/sys/fs/cgroup/a/memory.max"] = str(1000 << 20)
    given: list[int | None] = []

    def connect_to(address: str, *, arena_bytes: int | None = None, **options: Any) -> Channel:
        given.append(arena_bytes)
        return connect(address, arena_bytes=arena_bytes, **options)

    with team(*(teams.TeamWorker(teams.store_of(shard)) for shard in (LEFT, RIGHT))) as (left, right):
        roster.names(Member(left, LEFT), Member(right, RIGHT))
        with LLM(teams.MODEL, worker=roster.address, connect=connect_to) as llm:
            assert llm.generate(PROMPT, SOME)[0].token_ids == alone
    assert given == [250 << 20] * 2


@pytest.fixture(autouse=True)
def _replicas_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as anybody: on a busy machine one that is well may take longer than a run would wait for it."""
    monkeypatch.setattr(dialling, "GRACE_S", LIMIT_S)
    monkeypatch.setattr(private_sessions, "REPLICA_S", LIMIT_S)


class Silent(teams.TeamWorker):
    """Is reached, and says nothing."""

    def answer(self, arrival: Arrival) -> None:
        return None


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_replica_that_says_nothing_is_done_without(
    order: tuple[int, int], roster: RosterWriter, alone: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    greet = PrivateSessions.open

    def opened(sessions: PrivateSessions, channel: Channel, *others: Any, **options: Any) -> Any:
        stats, digests, handshake_s = others
        assert handshake_s is not None
        handshake_s = 0.1 if channel.address == addresses[0] else handshake_s  # one that is well may take its time
        return greet(sessions, channel, stats, digests, handshake_s, **options)

    monkeypatch.setattr(PrivateSessions, "open", opened)
    monkeypatch.setattr(parties, "RosterPlace", partial(RosterPlace, shuffle=lambda members: None))
    with team(Silent(teams.store_of(WHOLE)), teams.TeamWorker(teams.store_of(WHOLE))) as addresses:
        roster.names(*(Member(addresses[number], WHOLE) for number in order))
        with LLM(teams.MODEL, worker=roster.address) as llm:
            assert llm.generate(PROMPT, SOME)[0].token_ids == alone
            assert (state_of(llm).losses, state_of(llm).expelled) == (0, {})


def test_a_slice_that_nobody_has_any_more_goes_to_the_worker_that_is_started_in_its_place(
    roster: RosterWriter, alone: tuple[int, ...]
) -> None:
    mortal = teams.TeamWorker(teams.store_of(LEFT), teams.goes, 20)
    right, started = (teams.TeamWorker(teams.store_of(shard)) for shard in (RIGHT, LEFT))
    with team(mortal, right, started) as (left, other, later):
        roster.names(Member(left, LEFT), Member(other, RIGHT))
        with LLM(teams.MODEL, worker=roster.address) as llm:
            roster.names(Member(other, RIGHT), Member(later, LEFT))
            assert llm.generate(PROMPT, SOME)[0].token_ids == alone
            state = state_of(llm)
            assert (state.losses, state.reconnects, state.expelled) == (1, 1, {})
            assert started.products > 0


def test_two_replicas_that_become_one_and_two_again_cost_check_vectors_once_each(
    roster: RosterWriter, alone: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, renew = list[object](), PrivateModel.renewed

    def renewed(model: PrivateModel, *others: Any) -> PrivateModel:
        made.append(others)
        return renew(model, *others)

    monkeypatch.setattr(PrivateModel, "renewed", renewed)
    workers = [teams.TeamWorker(teams.store_of(WHOLE)) for _ in range(2)]
    with team(*workers) as addresses:
        both = [Member(address, WHOLE) for address in addresses]
        roster.names(*both)
        with LLM(teams.MODEL, worker=roster.address) as llm:
            for links, members in enumerate([both, both[:1], both]):
                roster.names(*members)
                if links:
                    assert llm.session is not None
                    llm.session.fail(WorkerLost("went away"))
                assert llm.generate(PROMPT, SOME)[0].token_ids == alone
                assert isinstance(llm.session, Team) == (members is both)
                assert len(made) == links


def test_where_the_roster_names_the_cheat_alone_the_end_says_why(roster: RosterWriter, own_key: KeyFiles) -> None:
    cheat = Cheat(50)
    with keyed(cheat, own_key) as false:
        roster.names(false)
        with LLM(MODEL, worker=WorkerConfig(roster.address, key=own_key.secret, patience_s=0.2)) as llm:
            with pytest.raises(Exception, match=r"no worker within 0\.2 s: .* nobody holds .*; expelled: ") as caught:
                answers(llm)
            assert str(false.key) in str(caught.value)
            assert state_of(llm).state == "failed"
            asked = cheat.products
            assert llm._workers is not None
            llm._workers._patience_s = LIMIT_S  # whoever is admitted again may take its time
            llm.readmit(str(false.key))
            answers(llm)
            assert cheat.products > asked
