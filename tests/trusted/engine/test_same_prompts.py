"""Requests with the same prompt: one computes it, nobody else does, and nobody waits for one that waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.trusted.engine.fakes import CONTEXT, GROW, SIZE, VOCABULARY, FakeCache, FakeDecoder, alone, fake_engine
from tsqp.errors import WorkerLost
from tsqp.model.cache import Positions
from tsqp.trusted.engine.engine import Engine
from tsqp.trusted.engine.limits import Limits
from tsqp.trusted.engine.request import Output, Request
from tsqp.trusted.engine.same_prompts import SamePrompts
from tsqp.trusted.engine.sampling import Sampler
from tsqp.trusted.engine.sampling_params import SamplingParams
from tsqp.trusted.engine.scheduler import Scheduler
from tsqp.trusted.tap import Taps

PROMPT = [(3 * row + row * row) % VOCABULARY for row in range(47)]


def params_of(choice: int, tokens: int = 6) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=1.0, seed=choice)


class Choices:
    """Answers to one prompt, each with a seed of its own."""

    def __init__(self, engine: Engine, count: int = 4, prompt: list[int] = PROMPT, **options: Any) -> None:
        self.engine, self.prompt = engine, prompt
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.numbers = [self._ask(choice, **options) for choice in range(count)]

    def _ask(self, choice: int, *, salt: str | None = "", **options: Any) -> int:
        def deliver(output: Output) -> None:
            assert output.token is not None
            self.tokens[choice].append(output.token)

        return self.engine.add_request(self.prompt, params_of(choice), salt=salt, deliver=deliver, **options)

    def check(self, *aborted: int) -> None:
        """Run out; everybody has the answer that it would have alone."""
        for _ in range(2_000):
            if not self.engine.has_work():
                break
            self.engine.step()
        assert not self.engine.has_work()
        for choice, tokens in enumerate(self.tokens):
            expected = alone(self.prompt, params_of(choice))
            assert tokens == (expected[: len(tokens)] if choice in aborted else expected)
        assert len(self.engine._books.scheduler._same) == 0
        assert not self.engine._books.scheduler._same._groups


def test_one_computes_the_prompt_and_the_others_its_last_token() -> None:
    decoder = FakeDecoder()
    engine = fake_engine(decoder, limits=Limits(prefill_rows=8))
    choices = Choices(engine)
    engine.step()
    assert decoder.passes == [[47]]
    assert (engine.counts().running, engine.counts().waiting) == (1, 3)
    engine.step()
    assert decoder.passes[1] == [1, 1, 1, 1]
    choices.check()
    counts = engine.counts()
    assert (counts.prompt_tokens, counts.found_tokens) == (47 + 3, 3 * 46)


@pytest.mark.parametrize("salt", [None, "same"])
def test_without_a_scope_nothing_is_shared(salt: str | None) -> None:
    decoder = FakeDecoder()
    engine = fake_engine(decoder)
    first, second = Choices(engine, 2, salt=salt), Choices(engine, 2, salt=salt, tenant="other")
    first.check()
    second.check()
    assert engine.counts().prompt_tokens == (4 * 47 if salt is None else 2 * 47 + 2), "one of each tenant"


def test_those_with_a_tap_or_log_probabilities_of_the_prompt_compute_all_of_it() -> None:
    for options in ({"tap": True}, {"prompt_logprobs": 0}):
        engine = fake_engine()
        for choice in range(2):
            params = SamplingParams(max_tokens=1, seed=choice, prompt_logprobs=options.get("prompt_logprobs"))
            tap = Taps().new() if "tap" in options else None
            engine.add_request(PROMPT, params, salt="", tap=tap)
        while engine.has_work():
            engine.step()
        assert engine.counts().prompt_tokens == 2 * 47


def test_of_a_short_prompt_nothing_is_copied() -> None:
    decoder = FakeDecoder()
    engine = fake_engine(decoder)
    Choices(engine, 3, PROMPT[:16]).check()
    assert decoder.passes[0] == [16, 16, 16]


def test_nobody_else_is_held_up() -> None:
    """Who waits for the prompt has no place in the queue meanwhile."""
    decoder = FakeDecoder()
    engine = fake_engine(decoder, limits=Limits(idle_rows=60))
    choices = Choices(engine, 3)
    arrived: list[Output] = []
    other = [1, *PROMPT[:20]]
    engine.add_request(other, SamplingParams(max_tokens=1), deliver=arrived.append)
    engine.step()
    assert decoder.passes == [[47, 21]]
    assert [one.token for one in arrived] == alone(other, SamplingParams(max_tokens=1))
    choices.check()


def test_a_prompt_that_is_cut_is_waited_for() -> None:
    decoder = FakeDecoder()
    engine = fake_engine(decoder, limits=Limits(idle_rows=10, prefill_rows=50))
    choices = Choices(engine)
    for part in (10, 10, 10):
        engine.step()
        assert decoder.passes[-1] == [part]
        assert engine.counts().running == 1
    engine.step()
    engine.step()
    assert decoder.passes[3:] == [[17], [1, 1, 1, 1]]
    choices.check()


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("end", ["abort", "preempt", "lose"])
def test_whatever_becomes_of_the_first(steps: int, end: str) -> None:
    """Before, during and after its prompt, which is computed in parts of ten."""
    decoder = FakeDecoder()
    engine = fake_engine(decoder, limits=Limits(idle_rows=10, prefill_rows=50))
    choices = Choices(engine)
    for _ in range(steps):
        engine.step()
    first = engine._books.scheduler.get(choices.numbers[0])
    assert first is not None
    if end == "abort":
        engine.abort(first.id)
    elif end == "preempt" and first.cache is not None:
        engine._books.scheduler.preempt(first)
    elif end == "lose":
        engine._books.scheduler.lose_caches()
    choices.check(*([0] if end == "abort" else []))
    if end == "abort":
        again = 10 if steps == 1 else 0  # positions that are too few to be kept
        assert engine.counts().prompt_tokens == again + 47 + (3 if steps > 3 else 2), (
            "what was computed is gone on with"
        )


def test_a_first_that_fails_is_followed_by_the_second() -> None:
    engine = fake_engine()

    class Raises(Sampler):
        def choose(self, logits: Any, text: Any) -> int:
            raise ValueError("no")

    engine.add_request(PROMPT, params_of(9), salt="", sampler=Raises(params_of(9)))
    Choices(engine).check()
    assert engine.counts().ended["error"] == 1


def test_a_pass_that_fails_changes_nothing() -> None:
    decoder = FakeDecoder()
    engine = fake_engine(decoder, limits=Limits(prefill_rows=8))
    choices = Choices(engine)
    for _ in range(2):
        decoder.fail = WorkerLost("went away")
        with pytest.raises(WorkerLost):
            engine.step()
        engine.step()
    assert decoder.passes == [[47], [1, 1, 1, 1]]
    choices.check()


def test_where_there_is_no_room_they_wait_as_ever() -> None:
    whole = -(-(CONTEXT - 1) // GROW) * GROW * SIZE
    engine = fake_engine(kv_memory=whole + 10 * SIZE)
    choices = Choices(engine)
    engine.step()
    engine.step()
    assert engine.counts().running == 1
    choices.check()
    assert engine.counts().prompt_tokens == 47 + 3, "the next one takes over what the first has left"


def test_a_copy_that_fails_does_not_spoil_those_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third may not begin with what the second was to have."""
    engine = fake_engine(limits=Limits(prefill_rows=8))
    choices = Choices(engine, 1)
    choices.check()
    real: Callable[..., None] = FakeCache.copy_from
    failing = [MemoryError()]

    def copy_from(cache: FakeCache, other: FakeCache, length: int) -> None:
        if failing:
            raise failing.pop()
        real(cache, other, length)

    monkeypatch.setattr(FakeCache, "copy_from", copy_from)
    outputs: list[Output] = []
    engine.add_request(PROMPT, params_of(7), salt="", deliver=outputs.append)  # begins with what was kept
    others = Choices(engine, 2)
    engine.step()
    assert [type(one.error) for one in outputs] == [MemoryError]
    others.check()


def test_caches_that_cannot_be_copied_are_not_waited_for() -> None:
    """Those of a worker that holds them itself."""

    class Elsewhere(Positions):
        def bytes_for(self, end: int) -> int:
            return 0

    scheduler = Scheduler(Elsewhere, Limits())
    for number in range(3):
        scheduler.add(request_of(number, PROMPT))
    assert len(scheduler._same) == 0
    assert list(scheduler.plan().values()) == [47, 47, 47]


def request_of(number: int, prompt: list[int]) -> Request:
    params = params_of(0)
    return Request(number, prompt, params, Sampler(params), max_positions=CONTEXT, scope=("", ""))


def test_a_group_is_of_one_scope_and_of_exactly_one_prompt() -> None:
    same = SamePrompts()
    requests = [request_of(number, PROMPT[: 47 - number // 4]) for number in range(8)]
    for request in requests:
        same.add(("scope", request.id % 2), request)
    assert [same.held_back(request) for request in requests] == [False, False, True, True] * 2
    cache = requests[0].cache = FakeCache()
    cache.write(PROMPT, 47)
    cache.advance(45)
    assert same.beginning(requests[2]) is None
    cache.advance(1)
    beginning = same.beginning(requests[2])
    assert beginning is not None
    assert (beginning.source, beginning.length) == (cache, 46)
    assert not same.held_back(requests[2])
    assert same.held_back(requests[3])
    same.remove(requests[1])
    assert not same.held_back(requests[3])
    for request in requests:
        same.remove(request)
    assert not same._groups
