"""In the private modes a request has the same logits, bit for bit, alone and in company, however it was computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from tests.families import random_tokens, tiny_model
from tests.trusted.guard.fakes import MODES
from tests.trusted.guard.hostile import serve
from tsqp import LLM, ComputeConfig, Limits, SamplingParams
from tsqp.api.config import ProtectionName
from tsqp.config.dtype import PrivateKVDtype
from tsqp.trusted.engine.engine import Engine
from tsqp.trusted.engine.sampling import Sampler

MODEL = str(tiny_model("llama").directory)
PROMPTS = [random_tokens(37), random_tokens(150, seed=1), random_tokens(1, seed=2), random_tokens(90, seed=3)]
PARAMS = [
    SamplingParams(max_tokens=20 + index, temperature=float(index % 2), seed=index, ignore_eos=True)
    for index in range(len(PROMPTS))
]
DTYPES: list[PrivateKVDtype] = ["bfloat16", "float32"]


class Recording:
    """A sampler that keeps the logits it was asked about."""

    def __init__(self, params: SamplingParams) -> None:
        self._sampler = Sampler(params)
        self.logits: list[torch.Tensor] = []
        self.tokens: list[int] = []

    def choose(self, logits: torch.Tensor, text: Sequence[int]) -> int:
        self.logits.append(logits.clone())
        self.tokens.append(self._sampler.choose(logits, text))
        return self.tokens[-1]


@pytest.fixture(autouse=True)
def _small_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contexts of the models are short: caches grow by few positions, so that memory can run out."""
    monkeypatch.setattr("tsqp.model.cache.GROW_ROWS", 16)


@contextmanager
def opened(
    mode: ProtectionName, address: str, kept: PrivateKVDtype, limits: Limits | None = None, memory: int | None = None
) -> Iterator[Engine]:
    compute = ComputeConfig(kv_dtype=kept, kv_memory=memory)
    with LLM(MODEL, protection=mode, worker=address, compute=compute, limits=limits) as llm:
        yield llm.engine


def add(engine: Engine, index: int, salt: str | None = None) -> Recording:
    one = Recording(PARAMS[index])
    engine.add_request(PROMPTS[index], PARAMS[index], sampler=one, salt=salt)
    return one


def run_out(engine: Engine) -> None:
    while engine.has_work():
        engine.step()


def assert_same(found: Sequence[Recording], expected: Sequence[Recording]) -> None:
    for ours, alone in zip(found, expected, strict=True):
        assert ours.tokens == alone.tokens
        assert len(ours.logits) == len(alone.logits)
        assert all(torch.equal(one, other) for one, other in zip(ours.logits, alone.logits, strict=True))


def each_alone(engine: Engine, indices: Sequence[int]) -> list[Recording]:
    found = []
    for index in indices:
        found.append(add(engine, index))
        run_out(engine)
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kept", DTYPES)
def test_in_company_in_parts_and_after_a_preemption(mode: ProtectionName, kept: PrivateKVDtype) -> None:
    indices = range(len(PROMPTS))
    with serve(MODEL) as (_, address):
        with opened(mode, address, kept, Limits(prefill_rows=7)) as engine:
            expected = each_alone(engine, indices)
            found = [add(engine, index) for index in indices[:2]]
            for _ in range(3):
                engine.step()
            found += [add(engine, index) for index in indices[2:]]
            for _ in range(18):  # the last prompt has rows of its answer by now
                engine.step()
            for request in list(engine._books.scheduler._running.values())[1:]:
                engine._books.scheduler.preempt(request)
            run_out(engine)
            assert_same(found, expected)
            memory = sum(engine.decoder.new_cache().bytes_for(positions) for positions in (48, 96))
        with opened(mode, address, kept, memory=memory) as engine:
            found = [add(engine, index) for index in (0, 3)]
            run_out(engine)
            assert engine.counts().preemptions > 0
            assert_same(found, [expected[0], expected[3]])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kept", DTYPES)
def test_a_conversation_that_goes_on(mode: ProtectionName, kept: PrivateKVDtype) -> None:
    """Found or not found, taken over or copied."""
    with serve(MODEL) as (_, address), opened(mode, address, kept) as engine:
        first = add(engine, 0, salt="")
        run_out(engine)
        goes_on = [*PROMPTS[0], *first.tokens, *random_tokens(9, seed=5)]
        other = [*PROMPTS[0][:30], *random_tokens(12, seed=6)]
        for prompt, hit in ((other, 30), (goes_on, 37)):
            before = engine.counts().found_tokens
            found, missed = Recording(PARAMS[0]), Recording(PARAMS[0])
            engine.add_request(prompt, PARAMS[0], sampler=found, salt="")
            run_out(engine)
            assert engine.counts().found_tokens == before + hit
            engine.add_request(prompt, PARAMS[0], sampler=missed)
            run_out(engine)
            assert_same([found], [missed])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kept", DTYPES)
def test_choices_of_one_prompt(mode: ProtectionName, kept: PrivateKVDtype) -> None:
    """Computed once, in parts, and copied."""
    prompt = PROMPTS[1]

    def ask(engine: Engine, choice: int, salt: str | None) -> Recording:
        one = Recording(PARAMS[choice])
        engine.add_request(prompt, PARAMS[choice], sampler=one, salt=salt)
        return one

    with serve(MODEL) as (_, address), opened(mode, address, kept, Limits(idle_rows=40, prefill_rows=7)) as engine:
        expected = []
        for choice in range(4):
            expected.append(ask(engine, choice, None))
            run_out(engine)
        before = engine.counts().prompt_tokens
        found = [ask(engine, choice, "") for choice in range(4)]
        run_out(engine)
        assert engine.counts().prompt_tokens == before + len(prompt) + 3
        assert_same(found, expected)


def test_tokens_are_those_of_transformers_where_numbers_are_floats() -> None:
    """Without a guard rows are not told apart; kept caches have answers too."""
    model = tiny_model("llama")
    params = SamplingParams(max_tokens=12)
    with LLM(MODEL, protection="local", compute=ComputeConfig(dtype="float32"), limits=Limits(prefill_rows=3)) as llm:
        engine = llm.engine
        sampler = Recording(params)
        engine.add_request(PROMPTS[0], params, sampler=sampler, salt="")
        engine.step()
        other = Recording(params)
        engine.add_request(PROMPTS[3], params, sampler=other)
        run_out(engine)
        longer = [*PROMPTS[0], *sampler.tokens, 5, 6]
        last = Recording(params)
        engine.add_request(longer, params, sampler=last, salt="")
        run_out(engine)
        assert engine.counts().found_tokens == 37 + 11
    assert sampler.tokens == model.greedy(PROMPTS[0], 12)
    assert other.tokens == model.greedy(PROMPTS[3], 12)
    assert last.tokens == model.greedy(longer, 12)
