"""Runs with a team of workers: the answers of one worker to the bit, whoever stalls, goes or cheats."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from tests.api.teams import MODEL, PLACEMENTS, Scene, Stall, TeamWorker, at_work, goes
from tests.commands import LIMIT_S, wait_until
from tests.families import random_tokens
from tests.trusted.guard import hostile
from tests.trusted.guard.altered import Altered, with_element
from tests.trusted.guard.fakes import MODES, Array
from tests.trusted.guard.hostile import edited, serve, serving
from tests.trusted.guard.runs import sent_rows
from tests.trusted.guard.scan import shared_pads
from tsqp import LLM, SamplingParams
from tsqp.api.config import ProtectionName
from tsqp.checkpoint import open_checkpoint
from tsqp.config.shard import Shard
from tsqp.errors import (
    CheckFailed,
    DeadlineExceeded,
    ModelMismatch,
    OptionError,
    ProductMismatch,
    ReplyRangeError,
    WorkerLost,
)
from tsqp.trusted.remote import team, usual_time
from tsqp.trusted.remote.team import Team
from tsqp.trusted.remote.usual_time import UsualTime
from tsqp.untrusted.store import WeightStore

PROMPT = random_tokens(21)
FEW = SamplingParams(max_tokens=4, ignore_eos=True)
CALLS = 4 * 2 + 1  # of one pass
STALLS_AT = 12  # a call of the second pass


@pytest.fixture(autouse=True)
def _nobody_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a call takes: a scheduler may hold up any thread. Who is to be slow is so by ``hasty``."""
    for name in ("FIRST_S", "LEAST_S", "MOST_S"):
        monkeypatch.setattr(usual_time, name, LIMIT_S)


def hasty(monkeypatch: pytest.MonkeyPatch, scene: Scene, stall: Stall) -> None:
    """Of worker 1, that stalls: somebody else is asked at once for the call that it owes, and for no other."""
    patience_s = UsualTime.patience_s

    def patience(usual: UsualTime, kinds: Iterable[Any]) -> float:
        asked = list(kinds)
        stalls = len(sent_rows_of(scene, 1)) > STALLS_AT and not stall.go.is_set()
        return 0.0 if stalls and not any(member.late for member, _ in asked) else patience_s(usual, asked)

    monkeypatch.setattr(UsualTime, "patience_s", patience)


@pytest.fixture(scope="module")
def alone() -> tuple[torch.Tensor, list[int]]:
    """What one worker's run answers."""
    with serve(MODEL) as (_, address), LLM(MODEL, protection="verified", worker=address) as llm:
        return llm.logits(PROMPT), list(llm.generate(PROMPT, FEW)[0].token_ids)


def team_of(llm: LLM) -> Team:
    assert isinstance(llm.session, Team)
    return llm.session


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_team_answers_as_one_worker_does(
    placement: str, mode: ProtectionName, alone: tuple[torch.Tensor, list[int]]
) -> None:
    with at_work(PLACEMENTS[placement]) as scene, scene.llm(mode) as llm:
        assert torch.equal(llm.logits(PROMPT), alone[0])
        assert llm.generate(PROMPT, FEW)[0].token_ids == tuple(alone[1])
        assert llm.stats.rpc_calls == (1 + FEW.max_tokens) * CALLS  # calls of the guard, whoever was sent them
        asked = {shard for worker, (_, shard, _) in zip(scene.workers, scene.dialled, strict=True) if worker.products}
        assert asked == set(PLACEMENTS[placement])
        llm.ping()


def test_one_row_goes_to_one_replica_and_many_rows_to_both() -> None:
    with at_work(PLACEMENTS["replicas"]) as scene, scene.llm("masked") as llm:
        llm.logits(random_tokens(7))
        few = [worker.products for worker in scene.workers]
        assert sum(few) == CALLS
        llm.logits(random_tokens(131))
        assert [worker.products - before for worker, before in zip(scene.workers, few, strict=True)] == [CALLS, CALLS]
        assert {hostile.rows_of(call) for worker in scene.workers for call in worker.calls[-CALLS:]} == {65, 66}


# Who cheats


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cheat", [0, 1, 2])
@pytest.mark.parametrize(
    ("attack", "expected"),
    [(hostile.wrong_last_row, ProductMismatch), (hostile.add_p, ReplyRangeError)],
    ids=["another number", "out of range"],
)
def test_who_cheats_is_named(mode: ProtectionName, cheat: int, attack: object, expected: type[CheckFailed]) -> None:
    with (
        at_work(PLACEMENTS["uneven"], {cheat: (edited(attack), 5)}) as scene,  # type: ignore[arg-type]
        scene.llm(mode) as llm,
    ):
        with pytest.raises(expected) as caught:
            llm.generate(PROMPT, FEW)
        assert caught.value.worker == f"worker {cheat}"
        assert str(caught.value).startswith(f"{scene.address(cheat)}: the worker's product ")
        with pytest.raises(expected):
            llm.generate(PROMPT, FEW)
        assert {worker.products for worker in scene.workers} == {6}  # nobody is asked for anything afterwards


@pytest.mark.parametrize("cheat", [0, 1])
def test_of_replicas_that_share_rows_the_one_that_cheats_is_named(cheat: int) -> None:
    attacks = {cheat: (edited(partial(hostile.other_number, row=0, column=0)), 3)}
    with at_work(PLACEMENTS["replicas"], attacks) as scene, scene.llm("masked") as llm:
        with pytest.raises(ProductMismatch) as caught:
            llm.logits(random_tokens(200))
        assert caught.value.worker == f"worker {cheat}"
        assert caught.value.row == (0, 100)[cheat]


@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_size_is_named_too(mode: ProtectionName) -> None:
    with at_work(PLACEMENTS["columns"], {1: (hostile.short, 2)}) as scene, scene.llm(mode) as llm:
        with pytest.raises(Exception, match=f"{scene.address(1)}: the reply has") as caught:
            llm.generate(PROMPT, FEW)
        assert getattr(caught.value, "worker", None) == "worker 1"


@pytest.mark.parametrize("mode", MODES)
def test_a_worker_whose_slices_are_other_weights_is_refused_before_any_call(mode: ProtectionName) -> None:
    """One bit of its own slice, of which the fingerprint says nothing; with a replica it is done without."""
    altered = Altered(open_checkpoint(MODEL), {"model.layers.1.self_attn.v_proj.weight": with_element(0.01)})
    shard = "1..3/1..2of2"
    store = WeightStore(altered, "float32", torch.device("cpu"), shard=Shard.parse(shard))
    false = TeamWorker(store)
    with at_work(["0..1", "1..3/0..1of2"]) as scene, serving(false) as address:
        scene.dialled.append((address, shard, "false"))
        with pytest.raises(ModelMismatch, match=f"{address} holds another model") as caught:
            scene.llm(mode)
        assert caught.value.worker == "false"
    with at_work(["0..1", "1..3/0..1of2", shard]) as scene, serving(false) as address:
        scene.dialled.insert(0, (address, shard, "false"))
        with scene.llm(mode) as llm:
            llm.generate(PROMPT, FEW)
            assert [member.name for member in team_of(llm).members] == ["worker 0", "worker 1", "worker 2"]
    assert false.products == 0


def test_a_team_that_is_no_model_is_refused() -> None:
    for shards, why in ((["0..1", "2..3"], "nobody holds"), (["0..3/0..1of2"], "nobody holds"), (["0..3"], None)):
        with at_work(shards) as scene:
            if why is None:
                with pytest.raises(OptionError, match="verified and masked"):
                    scene.llm("open")
                continue
            with pytest.raises(ModelMismatch, match=why):
                scene.llm("verified")


# What the workers see


def union(scene: Scene) -> list[Array]:
    """The rows that any member was sent, each once."""
    rows: dict[bytes, Array] = {}
    for capture in scene.captures.values():
        rows |= {row.tobytes(): row for part in sent_rows(capture) for row in part}
    widths = sorted({len(row) for row in rows.values()})
    return [np.stack([row for row in rows.values() if len(row) == width]) for width in widths]


@pytest.mark.parametrize("placement", ["mix", "replicas"])
def test_over_all_members_together_no_pad_is_used_twice(placement: str) -> None:
    with at_work(PLACEMENTS[placement]) as scene, scene.llm("masked") as llm:
        llm.generate([PROMPT, PROMPT, random_tokens(150)], FEW)
        llm.generate(PROMPT, FEW)
        used = pads_used(llm)
    check_that_no_pad_is_used_twice(scene, used)


@pytest.mark.parametrize("trouble", ["stalls", "goes"])
def test_over_all_members_together_no_pad_is_used_twice_whoever_is_asked_again(
    trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stall = Stall()
    shards = ["0..3/0..1of2", "0..3/1..2of2", "0..3/1..2of2"]
    attack = stall if trouble == "stalls" else goes
    with at_work(shards, {1: (attack, STALLS_AT)}) as scene, scene.llm("masked") as llm:
        if trouble == "stalls":
            hasty(monkeypatch, scene, stall)
        llm.generate([PROMPT, PROMPT, random_tokens(150)], FEW)
        llm.generate(PROMPT, FEW)
        used = pads_used(llm)
        assert llm.stats.hedged >= 1 if trouble == "stalls" else len(team_of(llm).members) == 2
        stall.go.set()
    check_that_no_pad_is_used_twice(scene, used)
    first, replica = (sent_rows_of(scene, number) for number in (1, 2))
    assert first[-1] in replica  # the same bytes were sent to both


def pads_used(llm: LLM) -> int:
    assert llm.guard is not None
    return llm.guard.counted()["pads_used"]


def check_that_no_pad_is_used_twice(scene: Scene, used: int) -> None:
    """In what each member was sent, and in what all of them were."""
    for capture in scene.captures.values():
        assert not shared_pads(sent_rows(capture))
    seen = union(scene)
    assert not shared_pads(seen)
    assert sum(map(len, seen)) == used  # each pad went out, and none under two inputs


# Who stalls, and who goes


@pytest.mark.parametrize("mode", MODES)
def test_a_replica_answers_for_one_that_stalls_and_gets_the_same_rows(
    mode: ProtectionName, alone: tuple[torch.Tensor, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(team, "SLOW_S", 0.0)  # it may have its share of many rows as soon as it owes nothing
    stall = Stall()
    shards = ["0..3/0..1of2", "0..3/1..2of2", "0..3/1..2of2"]
    with at_work(shards, {1: (stall, STALLS_AT)}) as scene, scene.llm(mode) as llm:
        hasty(monkeypatch, scene, stall)
        assert llm.generate(PROMPT, FEW)[0].token_ids == tuple(alone[1])
        assert llm.stats.hedged >= 1
        stalled, replica = (sent_rows_of(scene, number) for number in (1, 2))
        assert any(stalled[-1] == rows for rows in replica)  # the same bytes, so that no pad is used for two values
        (late,) = [member.late for member in team_of(llm).members if member.name == "worker 1"]
        assert len(late) == 1
        before = scene.workers[1].products

        def goes_on() -> bool:
            llm.logits(random_tokens(131))
            return scene.workers[1].products > before + CALLS

        stall.go.set()
        wait_until(goes_on)  # the late answer is dropped when it comes
        assert llm.generate(PROMPT, FEW)[0].token_ids == tuple(alone[1])
        assert len(team_of(llm).members) == 3


def sent_rows_of(scene: Scene, number: int) -> list[bytes]:
    """The payload of each call to one worker."""
    messages = scene.captures[scene.address(number)].messages
    return [seen.payloads[0] for seen in messages if seen.payloads]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at", [0, 4, 20])
def test_a_replica_takes_over_from_one_that_is_lost(
    mode: ProtectionName, at: int, alone: tuple[torch.Tensor, list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    with at_work(["0..3", "0..3"], {0: (goes, at)}) as scene, scene.llm(mode) as llm:
        before = llm.session
        for _ in range(3):
            assert llm.generate(PROMPT, FEW)[0].token_ids == tuple(alone[1])
        assert scene.workers[0].attacked is not None
        assert [member.name for member in team_of(llm).members] == ["worker 1"]
        assert llm.session is before  # the same link, with the same pads and check vectors
        assert f"{scene.address(0)}: the worker closed the connection" in caplog.text
        llm.ping()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at", [0, 4])
def test_without_a_replica_a_loss_ends_the_team_and_is_named(mode: ProtectionName, at: int) -> None:
    with at_work(PLACEMENTS["layers"], {1: (goes, at)}) as scene, scene.llm(mode) as llm:
        with pytest.raises(WorkerLost, match=scene.address(1)) as caught:
            llm.generate(PROMPT, FEW)
        assert caught.value.worker == "worker 1"
        asked = scene.workers[0].products
        with pytest.raises(WorkerLost):
            llm.generate(PROMPT, FEW)
        assert scene.workers[0].products == asked


def test_a_worker_that_is_gone_is_noticed_by_a_ping() -> None:
    with at_work(PLACEMENTS["columns"]) as scene, scene.llm("verified") as llm:
        llm.ping()
        scene.workers[1].go()
        with pytest.raises(WorkerLost, match=scene.address(1)):
            llm.ping()


def test_a_stall_without_a_replica_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    stall, first_of = Stall(), Team._first_of

    def waits(one: Team, answer: Any, part: Any) -> Any:
        stalls = part.asked[0].member.name == "worker 1" and len(sent_rows_of(scene, 1)) > STALLS_AT
        one.deadline_s = 0.1 if stalls else LIMIT_S  # of nobody else: each worker here has a deadline
        return first_of(one, answer, part)

    with at_work(PLACEMENTS["columns"], {1: (stall, STALLS_AT)}) as scene:
        monkeypatch.setattr(Team, "_first_of", waits)
        with scene.llm("verified") as llm, pytest.raises(DeadlineExceeded) as caught:
            llm.generate(PROMPT, FEW)
        assert caught.value.worker == "worker 1"
        stall.go.set()
