"""A second worker that multiplies pads: it sees keys only, and cannot cheat either."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from tests.families import random_tokens, tiny_model
from tests.trusted.guard import hostile
from tests.trusted.guard.fakes import record_blocks, secrets_of
from tests.trusted.guard.hostile import DEADLINE_S, Attack, HostileWorker, edited, pass_the_deadline_once_stalled, serve
from tests.trusted.guard.recorder import Recorder
from tsqp import LLM, SamplingParams
from tsqp.api.config import GuardConfig, RunConfig, WorkerConfig
from tsqp.api.places import Dialled
from tsqp.api.plan import Plan
from tsqp.api.private_links import PrivateLinks
from tsqp.api.until import Until
from tsqp.checkpoint import open_checkpoint, stored_dtype
from tsqp.errors import (
    ChannelError,
    CheckFailed,
    DeadlineExceeded,
    ModelMismatch,
    PadReused,
    ProductMismatch,
    ProtocolError,
    ReplyShapeError,
)
from tsqp.trusted.engine.engine import Engine
from tsqp.trusted.private import Guard
from tsqp.trusted.stats import Stats
from tsqp.wire.codec import decode_to_worker
from tsqp.wire.messages import Hello, MultiplyPads, Product
from tsqp.wire.transport import connect

MODEL = str(tiny_model("llama").directory)
PROMPT = random_tokens(21)
STEPS = 5


@dataclass
class Run:
    engine: Engine
    guard: Guard
    worker: HostileWorker
    dealer: HostileWorker
    to_worker: Recorder
    to_dealer: Recorder

    def tokens(self, prompt: list[int] = PROMPT) -> list[int]:
        params = SamplingParams(max_tokens=STEPS, ignore_eos=True)
        return [output.token or 0 for _, output in self.engine.generate([prompt], params)]


@contextmanager
def dealt(
    attack: Attack | None = None,
    at: int = 0,
    *,
    transport: str = "mem",
    ahead: int = 0,
    dealer_model: str = MODEL,
) -> Iterator[Run]:
    """An engine at ``masked`` with a worker and a dealer; nothing is made ahead unless ``fill`` is called."""
    asked = RunConfig(MODEL, "masked", WorkerConfig(deadline_s=DEADLINE_S), GuardConfig(pads_ahead=ahead))
    plan = Plan.of(asked, stored_dtype(MODEL))
    with ExitStack() as stack:
        worker, address = stack.enter_context(serve(MODEL, transport=transport))
        dealer, dealer_address = stack.enter_context(serve(dealer_model, attack, at, transport))
        channels: list[Recorder] = []

        def dial(where: str) -> Recorder:
            channels.append(Recorder(connect(where)))
            return channels[-1]

        links = PrivateLinks(open_checkpoint(MODEL), plan, lambda _: [Dialled(dial(dealer_address))], Stats())
        link = links.connect(lambda _: [Dialled(dial(address))], Until())
        stack.callback(link.close)
        assert link.guard is not None
        yield Run(links.engine(link.decoder, ()), link.guard, worker, dealer, *channels)


@pytest.fixture(scope="module")
def expected() -> tuple[torch.Tensor, list[int]]:
    """``masked`` without a dealer."""
    with serve(MODEL) as (_, address), LLM(MODEL, protection="masked", worker=address) as llm:
        tokens = llm.generate(PROMPT, SamplingParams(max_tokens=STEPS, ignore_eos=True))[0].token_ids
        return llm.logits(PROMPT), list(tokens)


@pytest.mark.parametrize("transport", ["mem", "ipc", "shm", "tcp"])
@pytest.mark.parametrize("ahead", [0, 32])
def test_a_dealer_changes_no_bit(transport: str, ahead: int, expected: tuple[torch.Tensor, list[int]]) -> None:
    with dealt(transport=transport, ahead=ahead) as run:
        assert run.guard.filler is not None
        run.guard.filler.fill()
        assert torch.equal(run.engine.logits(PROMPT), expected[0])
        assert run.tokens() == expected[1]


def test_each_side_gets_its_own_messages_only() -> None:
    with dealt() as run:
        run.tokens()
    hello, *calls = [decode_to_worker(control) for control, _, _ in run.to_worker.sent]
    dealer_hello, *deals = [decode_to_worker(control) for control, _, _ in run.to_dealer.sent]
    assert isinstance(hello, Hello)
    assert hello == dealer_hello
    assert calls
    assert deals
    assert all(isinstance(call, Product) and call.digits == 4 for call in calls)
    assert MultiplyPads.__struct_fields__ == ("id", "group", "layer", "blocks")
    for deal, (_, sizes, _) in zip(deals, run.to_dealer.sent[1:], strict=True):
        assert isinstance(deal, MultiplyPads)
        assert sizes == (32 * deal.blocks,)
    assert {(call.group, call.layer) for call in calls} == {(deal.group, deal.layer) for deal in deals}  # type: ignore[union-attr]


def test_no_key_is_dealt_twice_or_reaches_the_worker() -> None:
    with dealt() as first, dealt() as second:
        for run in (first, second):
            run.tokens()
    payloads = [payload for run in (first, second) for payload in run.to_dealer.payloads]
    keys = [payload[at : at + 32] for payload in payloads for at in range(0, len(payload), 32)]
    assert len(keys) == len(set(keys)) > 10
    assert all(any(key) for key in keys)
    sent = b"".join(first.to_worker.payloads + second.to_worker.payloads)
    assert not [key for key in keys if key in sent]


def test_a_dealer_is_told_the_same_whatever_the_prompt_says() -> None:
    with dealt() as first, dealt() as second:
        assert first.tokens() != second.tokens(random_tokens(len(PROMPT), seed=8))
    assert first.to_dealer.sent == second.to_dealer.sent


def test_the_weights_are_dropped_here() -> None:
    with dealt() as run:
        assert all(group.weights is None for group in run.guard.linears.groups.values())


LIES: dict[str, tuple[Attack, type[ChannelError]]] = {
    "flips one bit": (edited(hostile.flip_low_bit), ProductMismatch),
    "adds p": (edited(hostile.add_p), CheckFailed),
    "zeros": (edited(hostile.zeros), ProductMismatch),
    "last row wrong": (edited(hostile.wrong_last_row), ProductMismatch),
    "other layer": (hostile.other_layer, ProductMismatch),
    "other weights": (hostile.other_weights, ProductMismatch),
    "replays": (hostile.replayed, ProductMismatch),
    "wrong size": (hostile.short, ReplyShapeError),
    "old id": (hostile.old_id, ProtocolError),
    "stalls": (hostile.stalled, DeadlineExceeded),
}


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("lie", LIES)
def test_a_dealer_that_lies_in_a_call(lie: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pads were not ready, so that a product waits for the dealer: it ends the session."""
    attack, error = LIES[lie]
    blocks = record_blocks(monkeypatch)
    with dealt(attack, at) as run:
        if error is DeadlineExceeded:
            pass_the_deadline_once_stalled(monkeypatch, run.dealer)
        iterator = iter(run.engine.generate([PROMPT], SamplingParams(max_tokens=STEPS)))
        tokens: list[int] = []
        with pytest.raises(error):
            tokens.extend(output.token or 0 for _, output in iterator)
        assert run.dealer.attacked is not None
        assert not tokens
        sent = len(run.to_worker.sent), len(run.to_dealer.sent)
        for _ in range(2):
            with pytest.raises((ChannelError, PadReused)):
                run.engine.logits(PROMPT)
        assert (len(run.to_worker.sent), len(run.to_dealer.sent)) == sent  # neither is asked again
        for group in run.guard.linears.groups.values():
            assert (group.projections == 1).all()
        assert blocks
        assert not secrets_of(blocks)


@pytest.mark.parametrize("lie", ["flips one bit", "adds p", "zeros", "other layer", "wrong size"])
def test_a_dealer_that_lies_ahead_of_time(lie: str) -> None:
    """Whoever fills the pool finds out, and so does every call after it: there is no second guess."""
    attack, error = LIES[lie]
    with dealt(attack, at=1, ahead=32) as run:
        assert run.guard.filler is not None
        with pytest.raises(error):
            run.guard.filler.fill()
        sent = len(run.to_dealer.sent)
        with pytest.raises((error, PadReused)):
            run.tokens()
        assert len(run.to_dealer.sent) == sent
        assert len(run.to_worker.sent) == 1  # the handshake


@pytest.mark.parametrize("lie", ["flips one bit", "wrong size"])
def test_a_dealer_that_lies_to_the_thread(lie: str) -> None:
    attack, error = LIES[lie]
    with dealt(attack, ahead=32) as run:
        assert run.guard.filler is not None
        run.guard.filler.start()
        run.guard.filler._thread.join(20)
        with pytest.raises(error):
            run.tokens()
        assert len(run.to_worker.sent) == 1  # the handshake


def test_a_dealer_with_another_model_is_refused() -> None:
    other = str(tiny_model("llama-tied").directory)
    with pytest.raises(ModelMismatch), dealt(dealer_model=other):
        pass


def test_each_session_deals_other_keys() -> None:
    seen = []
    for _ in range(2):
        with dealt() as run:
            run.engine.logits(PROMPT)
        seen.append(run.to_dealer.payloads)
    assert all(not set(one) & set(two) for one, two in pairwise(seen))
