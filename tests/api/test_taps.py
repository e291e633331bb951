"""What is in the tap of one answer, while others go on: all that was sent for it, nothing of anybody else."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests.api.mortal import MODEL, PARAMS, PROMPTS, MortalRecorder, living, plain_worker
from tests.commands import LIMIT_S
from tests.families import random_tokens
from tests.trusted.guard.fakes import MODES
from tsqp import LLM, AsyncLLM, Completion, ComputeConfig, Limits, SamplingParams, WorkerConfig
from tsqp.api.config import GuardConfig, PartitionName, ProtectionName
from tsqp.audit.attack import VocabularyMatch
from tsqp.audit.capture import Capture
from tsqp.audit.public_model import PublicModel
from tsqp.audit.view import View
from tsqp.checkpoint import open_checkpoint
from tsqp.errors import OptionError
from tsqp.trusted.decode_step import DecodeStep
from tsqp.trusted.tap import Tap
from tsqp.wire.messages import Linear, Product

TAPPED = random_tokens(17, seed=100)
SAMPLED = SamplingParams(max_tokens=14, ignore_eos=True, temperature=1.0, seed=5, logprobs=3)
COMPANY = [
    (random_tokens(length, seed=length), tenant) for length, tenant in ((3, "a"), (30, "b"), (8, "a"), (55, "c"))
]


@contextmanager
def private(mode: ProtectionName, *workers: MortalRecorder, **options: Any) -> Iterator[LLM]:
    """A model with taps whose workers are threads behind sockets."""
    with ExitStack() as stack:
        addresses = tuple(stack.enter_context(living(one)) for one in workers)
        worker = WorkerConfig(addresses, deadline_s=LIMIT_S, patience_s=LIMIT_S)
        guard = GuardConfig(pads_ahead=0) if mode == "masked" else None
        with LLM(MODEL, protection=mode, worker=worker, guard=guard, taps=True, **options) as llm:
            yield llm


async def complete(llm: AsyncLLM, prompt: list[int], params: SamplingParams, **options: Any) -> Completion:
    async with await llm.open(prompt, params, **options) as answer:
        (completion,) = [delta.completion async for delta in answer if delta.completion is not None]
    return completion


def answered(llm: LLM, tap: Tap | None, *, company: bool = False) -> Completion:
    """The answer of the request with the tap, alone or among others that go on before and after it."""

    async def run() -> Completion:
        async with AsyncLLM(llm) as served:
            others = [
                asyncio.create_task(complete(served, prompt, PARAMS[number], tenant=tenant, salt=""))
                for number, (prompt, tenant) in enumerate(COMPANY if company else ())
            ]
            while company and not served.counts().new_tokens:
                await asyncio.sleep(0.001)
            found = await complete(served, TAPPED, SAMPLED, tenant="a", salt="", tap=tap)
            assert {len((await other).token_ids) for other in others} == ({12, 9, 20, 6} if company else set())
        return found

    return asyncio.run(asyncio.wait_for(run(), LIMIT_S))


def test_in_clear_the_rows_in_a_tap_are_those_of_its_own_tokens() -> None:
    """At ``open`` whose row it is can be read from the row."""
    checkpoint = open_checkpoint(MODEL)
    match = VocabularyMatch(PublicModel(checkpoint, 0))
    with (
        living(plain_worker()) as address,
        LLM(
            MODEL, protection="open", worker=address, compute=ComputeConfig(dtype="float32", threads=1), taps=True
        ) as llm,
    ):
        assert llm.taps is not None
        tap = llm.taps.new()
        completion = answered(llm, tap, company=True)
        assert llm.taps.current is None
    view, own = View(Capture(messages=tap.messages), checkpoint.config), [*TAPPED, *completion.token_ids[:-1]]
    assert match.recover(view.rows(("qkv", 0))) == own
    rows = Counter[tuple[str, int | None]]()
    for seen in tap.messages:
        if isinstance(seen.message, Linear):
            rows[seen.message.group, seen.message.layer] += seen.message.rows
    layers = range(checkpoint.config.num_layers)
    assert rows.pop(("lm_head", None)) == len(completion.token_ids)
    assert rows == {(group, layer): len(own) for group in ("qkv", "o", "gate_up", "down") for layer in layers}
    assert view.calls == tap.calls == len(tap.messages) - 1
    assert tap.bytes_seen > tap.kept_bytes > 0


@pytest.fixture(scope="module")
def undisturbed() -> Completion:
    """The answer without a tap, in a run that has none."""
    with living(MortalRecorder()) as address, LLM(MODEL, protection="verified", worker=address) as llm:
        assert llm.taps is None
        return answered(llm, None)


@pytest.mark.parametrize("company", [False, True], ids=["alone", "in company"])
@pytest.mark.parametrize("mode", MODES)
def test_text_and_logits_are_the_same_and_others_keep_their_compiled_steps(
    mode: ProtectionName, company: bool, undisturbed: Completion, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, real = list[int](), DecodeStep.run

    def run(step: DecodeStep, *arguments: Any) -> Any:
        assert llm.taps is not None
        assert llm.taps.current is None
        steps.append(len(arguments[1]))
        return real(step, *arguments)

    monkeypatch.setattr(DecodeStep, "run", run)
    with private(mode, MortalRecorder()) as llm:
        assert llm.taps is not None
        tap = llm.taps.new(range(len(TAPPED)))
        assert answered(llm, tap, company=company) == undisturbed
    assert bool(steps) == company
    assert tap.checks == tap.calls == len(tap.messages) - 1


@pytest.mark.parametrize("mode", MODES)
def test_what_is_in_a_tap_is_what_has_arrived(mode: ProtectionName) -> None:
    recorder = MortalRecorder()
    with private(mode, recorder) as llm:
        assert llm.taps is not None
        tap = llm.taps.new(range(3, 9))
        answered(llm, tap)
    assert [(seen.message, *(seen.payloads or ())) for seen in tap.messages[1:]] == recorder.seen
    first = recorder.seen[0][1]
    row = len(first) // len(TAPPED)
    assert b"".join(payload for seen in tap.rows for payload in seen.payloads or ()) == first[3 * row : 9 * row]
    assert tap.bytes_seen == sum(len(payload) for _, payload in recorder.seen) + sum(recorder.controls)


@pytest.mark.parametrize("deaths", [[3], [12], [3, 7, 30]], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_worker_that_is_lost_in_mid_answer(mode: ProtectionName, deaths: list[int], undisturbed: Completion) -> None:
    """What was sent twice was seen twice; the rows that are looked for are there once."""
    first, second = MortalRecorder(deaths), MortalRecorder()
    with private(mode, first, second) as llm:
        assert llm.taps is not None
        tap = llm.taps.new(range(4, len(TAPPED)))
        assert answered(llm, tap) == undisturbed
        assert llm.worker_state is not None
        assert llm.worker_state.losses >= 1
    assert sum(seen.message.rows for seen in tap.rows if isinstance(seen.message, Product)) == len(TAPPED) - 4
    sent = [payload for seen in tap.messages for payload in seen.payloads or ()]
    arrived = [payload for recorder in (first, second) for _, payload in recorder.seen]
    assert sorted(sent) == sorted(arrived)
    assert tap.checks < tap.calls == len(sent)


def test_what_a_dealer_is_sent_is_in_no_tap(undisturbed: Completion) -> None:
    """Pads are made for everybody, also while an answer is looked at."""
    recorder, dealer = MortalRecorder(), MortalRecorder()
    with living(recorder) as address, living(dealer) as dealt:
        guard = GuardConfig(pad_source=f"dealer={dealt}", dealer_no_separation=True, pads_ahead=0)
        with LLM(MODEL, protection="masked", worker=address, guard=guard, taps=True) as llm:
            assert llm.taps is not None
            tap = llm.taps.new()
            assert answered(llm, tap) == undisturbed
    assert dealer.seen
    assert [(seen.message, *(seen.payloads or ())) for seen in tap.messages[1:]] == recorder.seen


def test_an_abort_lets_go_of_it() -> None:
    async def run(llm: LLM) -> None:
        async with AsyncLLM(llm) as served:
            assert llm.taps is not None
            tap = llm.taps.new()
            answer = await served.open(TAPPED, SamplingParams(max_tokens=10_000, ignore_eos=True), tap=tap)
            await anext(aiter(answer))
            answer.abort()
            gone = weakref.ref(tap)
            del tap, answer
            while served.counts().running or gone() is not None:
                gc.collect()
                await asyncio.sleep(0.001)
            assert llm.taps.current is None

    with private("verified", MortalRecorder(), limits=Limits(running=2)) as llm:
        asyncio.run(asyncio.wait_for(run(llm), LIMIT_S))


@pytest.mark.parametrize("partition", ["op", "batched", "layer"])
def test_where_more_than_rows_is_sent_there_are_no_taps(partition: PartitionName) -> None:
    with pytest.raises(OptionError, match=f"compute.partition linear, not {partition}"):
        LLM(MODEL, protection="open", compute=ComputeConfig(partition), taps=True)


def test_without_a_worker_a_tap_stays_empty() -> None:
    with LLM(MODEL, protection="local", taps=True) as llm:
        assert llm.taps is not None
        tap = llm.taps.new(range(5))
        llm.engine.add_request(PROMPTS[0], PARAMS[0], tap=tap)
        while llm.engine.has_work():
            llm.engine.step()
        assert (tap.messages, tap.calls, tap.bytes_seen, tap.checks) == ([], 0, 0, 0)


@pytest.mark.parametrize("roster", ["roster:///nowhere/roster.json", "roster+tcp://127.0.0.1:1"])
def test_a_tap_shows_one_worker_and_no_roster_of_several(roster: str) -> None:
    with pytest.raises(OptionError, match=r"names several: give one worker\.address") as caught:
        LLM(MODEL, worker=roster, taps=True)
    assert caught.value.fields == ("worker.address",)
