"""Dealers that a roster names: whom nobody may deal with, and runs in which one is lost or cheats."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.api.mortal import MODEL, MortalRecorder, answers, living
from tests.commands import LIMIT_S
from tests.families import tiny_model
from tests.fronts import RosterWriter
from tests.public_keys import KEYS
from tests.trusted.guard import hostile
from tests.trusted.guard.hostile import edited
from tests.trusted.step_runs import RecordingWorker
from tsqp import LLM, Completion, WorkerConfig
from tsqp.api.config import GuardConfig, RunConfig
from tsqp.api.dealer import Dealer, DealerRoster, Party, check_apart, member_keys
from tsqp.api.worker_state import WorkerState
from tsqp.checkpoint import open_checkpoint
from tsqp.errors import ModelMismatch, ProductMismatch, RosterError
from tsqp.trusted.dealers import Dealers
from tsqp.trusted.guard.linears import MaskedLinears
from tsqp.wire.roster import Member, Roster
from tsqp.wire.transport.front import parse_roster_address
from tsqp.wire.transport.keys import ClientKeys, create_keys, load_public, load_secret

CONFIG = open_checkpoint(MODEL).config
WHOLE = "0..3"
AWAY = "tcp://192.0.2.1:7000"


class Cheat(MortalRecorder):
    """Answers one product falsely."""

    def __init__(self, at: int) -> None:
        RecordingWorker.__init__(self, MODEL, edited(hostile.flip_low_bit), at)
        self.deaths, self.asked = [], 0


def checked(*members: Member, workers: tuple[Party, ...] = (), separated: bool = True) -> None:
    dealers = DealerRoster(parse_roster_address("roster:///x"), None, None, separated)
    dealers.check(Roster(1, 1, members), iter(workers), CONFIG)


def test_dealers_of_another_party_are_dealt_with() -> None:
    members = Member(AWAY, WHOLE, KEYS[0]), Member("tcp://192.0.2.1:7001", WHOLE, KEYS[1])
    checked(*members, workers=(Party("tcp://192.0.2.2:7000", KEYS[2]), Party("shm:///w", None)))


@pytest.mark.parametrize("worker", [Party(AWAY, None), Party("tcp://192.0.2.9:1", KEYS[0]), Party(AWAY, KEYS[2])])
def test_a_dealer_that_is_a_worker_is_refused_whichever_of_them_it_is(worker: Party) -> None:
    honest = Member("tcp://192.0.2.8:7000", WHOLE, KEYS[1])
    for members in ((Member(AWAY, WHOLE, KEYS[0]), honest), (honest, Member(AWAY, WHOLE, KEYS[0]))):
        with pytest.raises(RosterError, match=f"the dealer {AWAY} is a worker too"):
            checked(*members, workers=(Party("shm:///w", None), worker))
    with pytest.raises(RosterError, match="is a worker too"):
        check_apart(Party(AWAY, KEYS[0]), [worker])


def test_a_dealer_without_a_key_is_for_tests() -> None:
    member = Member("tcp://127.0.0.1:7000", WHOLE)
    with pytest.raises(RosterError, match=r"whoever runs the worker may read the line .*guard\.dealer_no_separation"):
        checked(member)
    checked(member, separated=False)


@pytest.mark.parametrize("shard", ["0..3/0..1of2", "0..1", "1..3", "0..4"])
def test_a_dealer_that_holds_a_part_is_refused(shard: str) -> None:
    with pytest.raises(RosterError, match=f"holds {shard}; a dealer holds all of a model"):
        checked(Member(AWAY, WHOLE, KEYS[0]), Member("tcp://192.0.2.2:7000", shard, KEYS[1]))


def test_one_dealer_is_no_roster_and_a_roster_no_dealer() -> None:
    one = RunConfig(guard=GuardConfig(pad_source="dealer=ipc:///x", dealer_no_separation=True))
    several = RunConfig(guard=GuardConfig(pad_source="dealer=roster:///x"))
    assert (Dealer.of(several), DealerRoster.of(one), DealerRoster.of(RunConfig())) == (None, None, None)
    found = DealerRoster.of(several)
    assert found is not None
    assert (str(found.address), found.separated) == ("roster:///x", True)


def test_their_front_proves_its_key_and_each_of_them_its_own(tmp_path: Path) -> None:
    me, front = create_keys(tmp_path, "me"), create_keys(tmp_path, "front")
    guard = GuardConfig(pad_source=f"dealer=roster+{AWAY}", dealer_key=front.public)
    found = DealerRoster.of(RunConfig(worker=WorkerConfig(key=me.secret), guard=guard))
    assert found is not None
    own = load_secret(me.secret)
    assert (found.front, found.own) == (ClientKeys(own, load_public(front.public)), own)
    assert member_keys(found.own, Member(AWAY, WHOLE, KEYS[0])) == ClientKeys(own, KEYS[0].encode())
    assert member_keys(found.own, Member("tcp://127.0.0.1:1", WHOLE)) is None


@pytest.fixture(scope="module")
def undisturbed() -> list[Completion]:
    with living(MortalRecorder()) as address, LLM(MODEL, protection="verified", worker=address) as llm:
        return answers(llm)


class Dealt:
    """A run with a worker and some dealers, which a roster names. Pads are made when they are needed, or ``ahead``."""

    def __init__(self, stack: ExitStack, path: Path, *dealers: MortalRecorder) -> None:
        self.roster = RosterWriter(path)
        self.worker = stack.enter_context(living(MortalRecorder()))
        self.addresses = [stack.enter_context(living(dealer)) for dealer in dealers]
        self.names(*self.addresses)

    def names(self, *addresses: str) -> None:
        self.roster.names(*(Member(address, WHOLE) for address in addresses))

    def llm(self, *, ahead: int = 0) -> LLM:
        guard = GuardConfig(pad_source=f"dealer={self.roster.address}", dealer_no_separation=True, pads_ahead=ahead)
        return LLM(MODEL, worker=WorkerConfig(self.worker), guard=guard)


def state_of(llm: LLM) -> WorkerState:
    state = llm.worker_state
    assert state is not None
    return state


def test_all_make_pads_and_one_that_is_lost_costs_nothing(tmp_path: Path, undisturbed: list[Completion]) -> None:
    dealers = MortalRecorder(), MortalRecorder()
    with ExitStack() as stack, Dealt(stack, tmp_path / "dealers.json", *dealers).llm() as llm:
        assert answers(llm) == undisturbed
        before = [dealer.products for dealer in dealers]
        assert min(before) > 10
        dealers[0].deaths = [dealers[0].asked + 5]
        assert answers(llm) == undisturbed
        assert not dealers[0].deaths
        assert (state_of(llm).losses, state_of(llm).reconnects) == (0, 0)
        assert dealers[1].products - before[1] > dealers[0].products - before[0]


@pytest.mark.parametrize("at", [0, 7])
def test_one_that_cheats_is_expelled_and_the_others_go_on(
    at: int, tmp_path: Path, undisturbed: list[Completion]
) -> None:
    cheat, honest = Cheat(at), MortalRecorder()
    with ExitStack() as stack:
        dealt = Dealt(stack, tmp_path / "dealers.json", cheat, honest)
        with dealt.llm() as llm:
            assert answers(llm) == undisturbed
            assert list(state_of(llm).expelled) == dealt.addresses[:1]
            assert (state_of(llm).failed_checks, state_of(llm).state, state_of(llm).address) == (
                1,
                "ready",
                dealt.worker,
            )
            asked = cheat.products
            assert asked == cheat.attacked + 1  # type: ignore[operator]
            assert answers(llm) == undisturbed
            assert cheat.products == asked


@pytest.mark.parametrize("first", ["the run's", "the filler's"])
def test_who_cheats_while_two_threads_ask_is_expelled_and_the_worker_stays(
    first: str, tmp_path: Path, undisturbed: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both wait for a dealer. The other product fails too: it is false as well, or meets forgotten check vectors."""
    ask, end = Dealers.products, MaskedLinears.end
    filling, running, over = threading.Event(), threading.Event(), threading.Event()
    fillers, false = list[threading.Thread](), list[str]()

    def asked(dealers: Dealers, group: Any, keys: Any, pads: Any) -> Any:
        products = ask(dealers, group, keys, pads)
        if over.is_set():
            return products
        if threading.current_thread().name == "tsqp-pads":
            fillers.append(threading.current_thread())
            filling.set()
            assert (over if first == "the run's" else running).wait(LIMIT_S)
            products[0, 0] ^= first == "the filler's"
        else:
            running.set()
            if first == "the filler's":
                fillers[0].join(LIMIT_S)
            products[0, 0] ^= 1
            false.append(dealers._asked.last.name)
        return products

    def ended(linears: MaskedLinears, error: BaseException) -> None:
        end(linears, error)
        over.set()
        fillers[0].join(LIMIT_S)

    with ExitStack() as stack:
        dealt = Dealt(stack, tmp_path / "dealers.json", MortalRecorder(), MortalRecorder())
        monkeypatch.setattr(Dealers, "products", asked)
        monkeypatch.setattr(MaskedLinears, "end", ended)
        with dealt.llm(ahead=32) as llm:
            assert filling.wait(LIMIT_S)  # and stays there
            assert answers(llm) == undisturbed
            state = state_of(llm)
            assert (list(state.expelled), state.address, state.failed_checks) == (false, dealt.worker, 1)


def test_where_nobody_knows_who_it_was_no_more_pads_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProductMismatch, "of_worker", lambda self, name, address: None)
    with ExitStack() as stack:
        dealt = Dealt(stack, tmp_path / "dealers.json", Cheat(7), MortalRecorder())
        with dealt.llm() as llm:
            for _ in range(2):
                with pytest.raises(ProductMismatch, match="pads"):
                    answers(llm)
            assert (state_of(llm).expelled, state_of(llm).state) == ({}, "failed")


def test_one_with_another_model_is_done_without(tmp_path: Path, undisturbed: list[Completion]) -> None:
    other, honest = MortalRecorder(model=str(tiny_model("llama").directory)), MortalRecorder()
    with ExitStack() as stack:
        dealt = Dealt(stack, tmp_path / "dealers.json", other, honest)
        with dealt.llm() as llm:
            assert answers(llm) == undisturbed
            assert (other.products, state_of(llm).expelled) == (0, {})
        dealt.names(dealt.addresses[0])
        with pytest.raises(ModelMismatch, match="the dealer"):
            dealt.llm()


def test_one_dealer_that_a_roster_names_as_a_worker_is_refused(tmp_path: Path) -> None:
    workers = RosterWriter(tmp_path / "workers.json")
    with living(MortalRecorder()) as address:
        workers.names(Member(address, WHOLE))
        guard = GuardConfig(pad_source=f"dealer={address}", dealer_no_separation=True)
        with pytest.raises(RosterError, match="is a worker too"):
            LLM(MODEL, worker=workers.address, guard=guard)


def test_a_worker_among_the_dealers_is_refused_at_the_start(tmp_path: Path) -> None:
    with ExitStack() as stack:
        dealt = Dealt(stack, tmp_path / "dealers.json", MortalRecorder())
        dealt.names(*dealt.addresses, dealt.worker)
        with pytest.raises(RosterError, match=r"^the dealer: the dealer .* is a worker too") as caught:
            dealt.llm()
        assert caught.value.side == "dealer"
