"""The engine over a fake decoder: whatever arrives, ends or fails, each answer is that of its request alone."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trusted.engine.fakes import (
    CONTEXT,
    GROW,
    SIZE,
    TINY,
    VOCABULARY,
    FakeCache,
    FakeDecoder,
    alone,
    fake_engine,
    logprobs_of,
)
from tsqp.config.model import RopeConfig
from tsqp.errors import InputError, NumericError, PadsExhausted, PromptError, QueueFull, WorkerLost
from tsqp.model.batch import Batch
from tsqp.model.pending import Steps
from tsqp.trusted.engine.caller import Caller
from tsqp.trusted.engine.engine import Engine
from tsqp.trusted.engine.forward_pass import finite_rows
from tsqp.trusted.engine.limits import Limits
from tsqp.trusted.engine.request import Output
from tsqp.trusted.engine.sampling_params import SamplingParams
from tsqp.trusted.engine.scheduler import Shares

WHOLE = -(-(CONTEXT - 1) // GROW) * GROW * SIZE  # bytes of the longest request there can be


@pytest.fixture(scope="module", autouse=True)
def _prompts_are_read_in_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tsqp.trusted.engine.request.ROWS_WITH_LOGITS", 7)
        yield


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [(seed * 7 + row * 3 + row * row) % VOCABULARY for row in range(length)]


@dataclass
class Asked:
    """A request of a test, and what it was given."""

    prompt: list[int]
    params: SamplingParams
    tenant: str
    number: int
    aborted: bool = False
    tokens: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def take(self, output: Output) -> None:
        assert not self.reasons, "nothing comes after the end"
        assert output.token is not None
        if self.params.prompt_logprobs is not None and not self.tokens:
            assert output.prompt_logprobs == logprobs_of(self.prompt, self.params.prompt_logprobs)
        else:
            assert output.prompt_logprobs is None
        self.tokens.append(output.token)
        if output.finish_reason is not None:
            self.reasons.append(output.finish_reason)


def ask(
    engine: Engine,
    prompt: list[int],
    params: SamplingParams,
    tenant: str = "",
    salt: str | None = None,
    patient: bool = False,
) -> Asked:
    asked = Asked(prompt, params, tenant, -1)
    asked.number = engine.add_request(prompt, params, tenant=tenant, salt=salt, patient=patient, deliver=asked.take)
    return asked


def run_out(engine: Engine, most: int = 10_000) -> None:
    for _ in range(most):
        if not engine.has_work():
            return
        engine.step()
    raise AssertionError("requests that do not end")


def check_books(engine: Engine, kv_memory: int) -> None:
    """What is counted is what is there, and within its bounds."""
    scheduler = engine._books.scheduler
    counts = engine.counts()
    running = list(scheduler._running.values())
    assert counts.added == counts.waiting + counts.running + sum(counts.ended.values())
    assert min(counts.waiting, counts.running, counts.kv_bytes, counts.kept_bytes) >= 0
    assert counts.running <= engine.limits.running
    assert counts.waiting == sum(len(queue) for queue in scheduler._queues.values())
    assert all(scheduler._queues.values()), "no empty queues"
    assert counts.kv_bytes == sum(request.charge for request in running)
    assert counts.kv_bytes + counts.kept_bytes == scheduler._budget.used <= kv_memory
    kept = [one.cache for one in scheduler._prefixes._kept.values()]
    assert counts.kept_bytes == sum(cache.bytes_for(0) for cache in kept)
    for request in running:
        assert isinstance(request.cache, FakeCache)
        assert request.cache.bytes_for(0) <= request.charge
        assert request.cache.tokens[: request.computed] == request.tokens[: request.computed]
    held = [id(cache) for cache in kept] + [id(request.cache) for request in running]
    assert len(set(held)) == len(held), "a cache has one owner"


def watch_plans(engine: Engine) -> None:
    """Hold each plan against the bounds of a step."""
    scheduler, limits = engine._books.scheduler, engine.limits
    plan = scheduler.plan

    def watched() -> Shares:
        decoding = {request for request in scheduler._running.values() if request.decoding}
        shares = plan()
        assert shares or not len(scheduler), "a step moves something"
        assert all(0 < rows <= request.rest for request, rows in shares.items())
        prefill = [rows for request, rows in shares.items() if request not in decoding]
        steps = decoding & set(shares)
        assert set(list(shares)[: len(steps)]) == steps, "decode rows first"
        if any(not request.patient for request in steps):
            assert sum(prefill) <= (limits.idle_rows if limits.prefill_rows is None else limits.prefill_rows)
        else:
            cut = [rows for request, rows in shares.items() if rows < request.most_rows]
            assert len(cut) <= 1
            assert sum(prefill) <= 2 * limits.idle_rows
            assert sum(prefill[:-1]) < limits.idle_rows or cut, "the last one is not cut, or others pass one that is"
        assert all(rows <= 7 for request, rows in shares.items() if request.reads_prompt)
        return shares

    scheduler.plan = watched  # type: ignore[method-assign]


REQUEST = st.tuples(
    st.integers(1, 30),  # the prompt's length
    st.integers(1, 20),  # tokens at most
    st.sampled_from("ABC"),
    st.integers(0, 2),  # which of a few beginnings
    st.sampled_from([None, "", "x"]),
    st.integers(0, 5),  # the seed
    st.sampled_from([None, None, 0, 2]),  # log-probabilities of the prompt
    st.booleans(),  # whether nobody follows the answer
    st.sampled_from([1, 1, 1, 3]),  # choices
)
ACTION = st.one_of(
    st.tuples(st.just("add"), REQUEST),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.sampled_from(["abort", "fail"]), st.integers(0, 30)),
)
ROWS = st.none() | st.integers(1, 12)
LIMITS = st.builds(Limits, running=st.integers(1, 5), prefill_rows=ROWS, idle_rows=st.integers(1, 40))


@settings(max_examples=150)
@given(st.lists(ACTION, max_size=40), LIMITS, st.integers(0, 60))
def test_every_answer_is_that_of_its_request_alone(actions: list[Any], limits: Limits, spare: int) -> None:
    """Arrivals, aborts, failed passes, preemption, kept caches, chunks: no token changes and every request ends."""
    decoder = FakeDecoder()
    kv_memory = WHOLE + spare * SIZE
    engine = fake_engine(decoder, limits=limits, kv_memory=kv_memory)
    asked: list[Asked] = []
    watch_plans(engine)
    for action, value in actions:
        if action == "add":
            length, tokens, tenant, beginning, salt, seed, logprobs, patient, choices = value
            for choice in range(choices):
                params = SamplingParams(
                    max_tokens=tokens, temperature=float(seed % 2), seed=seed + choice, prompt_logprobs=logprobs
                )
                asked.append(ask(engine, prompt_of(length, beginning), params, tenant, salt, patient))
        elif action == "step":
            for _ in range(value):
                engine.step()
        elif action == "abort" and asked:
            one = asked[value % len(asked)]
            one.aborted = one.aborted or not one.reasons
            engine.abort(one.number)
        elif action == "fail" and engine.has_work():
            decoder.fail = WorkerLost("went away")
            with pytest.raises(WorkerLost):
                engine.step()
        check_books(engine, kv_memory)
    while engine.has_work():
        engine.step()
        check_books(engine, kv_memory)
    for one in asked:
        expected = alone(one.prompt, one.params)
        assert one.tokens == expected[: len(one.tokens)]
        assert one.aborted or (one.tokens, one.reasons) == (expected, ["length"])
    engine.forget()
    assert engine.counts().kept_bytes == engine._books.scheduler._budget.used == 0
    assert not engine._books.scheduler._requests
    assert not engine._books.scheduler._same._groups
    assert not engine._books.scheduler._fair._given


def test_a_step_has_decode_rows_first_and_then_a_bounded_number_of_others() -> None:
    decoder = FakeDecoder()
    engine = fake_engine(decoder, limits=Limits(prefill_rows=5))
    ask(engine, prompt_of(3), SamplingParams(max_tokens=20))
    engine.step()
    ask(engine, prompt_of(17), SamplingParams(max_tokens=5))
    run_out(engine)
    assert decoder.passes[:6] == [[3], [1, 5], [1, 5], [1, 5], [1, 2], [1, 1]]


def test_without_answers_under_way_prompts_are_whole() -> None:
    decoder = FakeDecoder()
    engine = fake_engine(decoder, limits=Limits(prefill_rows=2, idle_rows=20))
    for length in (15, 15, 15):
        ask(engine, prompt_of(length), SamplingParams(max_tokens=2))
    engine.step()
    assert decoder.passes[0] == [15, 15]


@pytest.mark.parametrize(
    ("length", "passes"), [(40, [[40]]), (41, [[20], [21]]), (60, [[20], [40]]), (61, [[20], [20], [21]])]
)
def test_a_prompt_of_twice_the_idle_rows_is_one_pass_and_a_longer_one_is_cut(
    length: int, passes: list[list[int]]
) -> None:
    """Between two of its passes others come and go."""
    decoder = FakeDecoder()
    engine = fake_engine(decoder, limits=Limits(idle_rows=20))
    one = ask(engine, prompt_of(length), SamplingParams(max_tokens=1))
    run_out(engine)
    assert decoder.passes == passes
    assert one.tokens == alone(prompt_of(length), SamplingParams(max_tokens=1))


def test_who_comes_while_a_long_prompt_is_computed_need_not_wait_for_its_end() -> None:
    decoder = FakeDecoder(config=replace(TINY, max_positions=2000))
    engine = fake_engine(decoder, limits=Limits(idle_rows=20))
    long = ask(engine, prompt_of(1500), SamplingParams(max_tokens=1))
    engine.step()
    short = [ask(engine, prompt_of(15, seed), SamplingParams(max_tokens=1)) for seed in range(2)]
    engine.step()
    assert decoder.passes == [[20], [20, 15]], "one of them is done with in twice the idle rows, beside the long one"
    engine.step()
    assert all(one.tokens for one in short)
    assert decoder.passes[2] == [20, 15]
    engine.abort(long.number)
    assert not engine.has_work(), "an abort is seen between two passes"


def test_who_is_of_another_tenant_comes_first_after_a_part_of_a_long_prompt() -> None:
    decoder = FakeDecoder(config=replace(TINY, max_positions=2000))
    engine = fake_engine(decoder, limits=Limits(idle_rows=20))
    ask(engine, prompt_of(1500), SamplingParams(max_tokens=1), "A")
    engine.step()
    other = ask(engine, prompt_of(5), SamplingParams(max_tokens=1), "B")
    engine.step()
    engine.step()
    assert other.tokens
    assert decoder.passes == [[20], [20], [5, 15]] or decoder.passes == [[20], [20], [15, 5]]


def test_prompts_that_would_be_more_than_twice_the_idle_rows_together_are_cut() -> None:
    decoder = FakeDecoder()
    engine = fake_engine(decoder, limits=Limits(idle_rows=20))
    for length in (15, 30):
        ask(engine, prompt_of(length), SamplingParams(max_tokens=1), patient=True)
    run_out(engine)
    assert decoder.passes == [[15, 5], [25]]


def test_beside_answers_that_nobody_follows_prompts_are_whole() -> None:
    decoder = FakeDecoder()
    engine = fake_engine(decoder, limits=Limits(prefill_rows=2, idle_rows=20))
    ask(engine, prompt_of(3), SamplingParams(max_tokens=20), patient=True)
    engine.step()
    for seed in range(3):
        ask(engine, prompt_of(15, seed), SamplingParams(max_tokens=5))
    engine.step()
    assert decoder.passes[1] == [1, 15, 15]
    engine.step()
    assert decoder.passes[2] == [1, 1, 1, 2], "now there are answers that somebody follows"


def test_one_answer_that_somebody_follows_is_enough() -> None:
    decoder = FakeDecoder()
    engine = fake_engine(decoder, limits=Limits(prefill_rows=2))
    for patient in (True, False):
        ask(engine, prompt_of(3), SamplingParams(max_tokens=20), patient=patient)
    engine.step()
    ask(engine, prompt_of(15), SamplingParams(max_tokens=5), patient=True)
    engine.step()
    assert decoder.passes[1] == [1, 1, 2]


def test_the_rows_beside_answers_follow_the_time_that_steps_take() -> None:
    """A pass takes 20 s and 1 s for each row of a prompt: 40 of these fit where a step may last three times as long.

    That is six times six.
    """
    decoder, now = FakeDecoder(config=replace(TINY, max_positions=2000)), [0.0]

    def clock() -> float:
        if len(decoder.passes) > len(seen):
            seen.append(decoder.passes[-1])
            now[0] += 20 + sum(rows for rows in seen[-1] if rows > 1)
        return now[0]

    seen: list[list[int]] = []
    engine = fake_engine(decoder, limits=Limits(slowdown=3.0), clock=clock)
    ask(engine, prompt_of(3), SamplingParams(max_tokens=200))
    engine.step()
    ask(engine, prompt_of(1500), SamplingParams(max_tokens=5))
    for _ in range(20):
        engine.step()
    rows = [sum(one[1:]) for one in decoder.passes]
    assert rows[1] == 0, "what a step takes without rows of prompts is measured first"
    assert rows[2:8] == [6, 12, 18, 24, 36, 42]
    assert rows[8:] == [36] * len(rows[8:])


class PassClock:
    """The seconds of a decoder's passes: each takes 20 ms, with rows of prompts 100 ms more, and 1 ms for each row."""

    def __init__(self, decoder: FakeDecoder) -> None:
        self._passes = decoder.passes
        self.took: list[float] = []

    def __call__(self) -> float:
        for passed in self._passes[len(self.took) :]:
            prompts = sum(rows for rows in passed if rows > 1)
            self.took.append(0.02 + bool(prompts) * 0.1 + 0.001 * prompts)
        return sum(self.took)


def test_many_short_prompts_join_a_few_answers_at_once_and_a_long_one_in_parts() -> None:
    decoder = FakeDecoder(config=replace(TINY, max_positions=2000))
    engine = fake_engine(decoder, clock=PassClock(decoder))
    ask(engine, prompt_of(30), SamplingParams(max_tokens=200))
    engine.step()
    for seed in range(12):
        ask(engine, prompt_of(30, seed), SamplingParams(max_tokens=100))
    for _ in range(8):
        engine.step()
    first, *parts = decoder.passes
    assert first == [30]
    assert parts[:2] == [[1], [1, 6]], "what that would save is measured first"
    assert parts[2][:2] == [1, 24]
    assert set(parts[2][2:]) == {30}
    assert len(parts[-1]) == 13, "all have joined"

    ask(engine, prompt_of(1500), SamplingParams(max_tokens=5))
    before = len(decoder.passes)
    for _ in range(20):
        engine.step()
    assert max(max(one) for one in decoder.passes[before:]) <= 12


@pytest.mark.parametrize("tenants", [1, 2])
def test_prompts_at_once_take_half_of_the_time_at_most_from_answers_of_other_tenants(tenants: int) -> None:
    decoder = FakeDecoder(config=replace(TINY, max_positions=2000))
    clock = PassClock(decoder)
    engine = fake_engine(decoder, clock=clock)
    ask(engine, prompt_of(30), SamplingParams(max_tokens=1900), tenant="0")
    asked, steps = 0, 300
    for _ in range(steps):
        while engine.counts().waiting < 20:
            ask(engine, prompt_of(30, asked), SamplingParams(max_tokens=1), tenant=str(tenants - 1))
            asked += 1
        engine.step()
    at_once = [seconds for seconds, rows in zip(clock.took, decoder.passes, strict=True) if sum(rows) > 30]
    share = sum(at_once) / sum(clock.took)
    assert 0.3 < share <= 0.5 if tenants > 1 else share > 0.9


def test_short_prompts_pass_a_long_one_of_their_tenant_which_goes_on_meanwhile() -> None:
    decoder = FakeDecoder(config=replace(TINY, max_positions=2000))
    engine = fake_engine(decoder, clock=PassClock(decoder))
    ask(engine, prompt_of(30), SamplingParams(max_tokens=1900))
    engine.step()
    long = ask(engine, prompt_of(1500), SamplingParams(max_tokens=1))
    for _ in range(4):
        engine.step()
    short = [ask(engine, prompt_of(30, seed), SamplingParams(max_tokens=1)) for seed in range(8)]
    begun = len(decoder.passes)
    while not all(one.tokens for one in short):
        engine.step()
        assert not long.tokens
    passes = decoder.passes[begun:]
    assert len(passes) <= 5
    assert all(1 < rows[1] < 30 for rows in passes), "the long one has its part of each"
    assert {rows for one in passes for rows in one[2:]} == {30}


def test_a_long_prompt_is_held_up_for_half_of_the_time_at_most_by_those_that_pass_it() -> None:
    decoder = FakeDecoder(config=replace(TINY, max_positions=2000))
    clock = PassClock(decoder)
    engine = fake_engine(decoder, clock=clock)
    ask(engine, prompt_of(30), SamplingParams(max_tokens=1900))
    engine.step()
    long, asked = ask(engine, prompt_of(1500), SamplingParams(max_tokens=1)), 0
    while not long.tokens:
        while engine.counts().waiting < 20:
            ask(engine, prompt_of(30, asked), SamplingParams(max_tokens=1))
            asked += 1
        engine.step()
    at_once = [seconds for seconds, rows in zip(clock.took, decoder.passes, strict=True) if sum(rows) > 60]
    assert 0.1 < sum(at_once) / sum(clock.took) <= 0.5
    assert asked > 40, "those pass it"


def test_rows_of_a_prompt_and_of_an_answer_are_told_apart_whatever_happens() -> None:
    """Cut prompts, preempted answers, kept beginnings: each position is of the kind that it would be alone."""
    engine = fake_engine(limits=Limits(prefill_rows=1, running=3), kv_memory=WHOLE)
    for seed in range(4):
        ask(engine, prompt_of(9 + seed, seed), SamplingParams(max_tokens=25), salt="")
    while engine.has_work():
        engine.step()
        for request in engine._books.scheduler._running.values():
            assert isinstance(request.cache, FakeCache)
            kinds = request.cache.steps[: request.computed]
            assert kinds == [position >= request.prompt_length for position in range(request.computed)]
    assert engine.counts().preemptions > 0


def test_memory_that_runs_out_costs_the_newest_its_cache_and_nobody_a_token() -> None:
    params = SamplingParams(max_tokens=30)
    engine = fake_engine(kv_memory=WHOLE)
    asked = [ask(engine, prompt_of(10, seed), params) for seed in range(3)]
    run_out(engine)
    assert engine.counts().preemptions > 0
    assert [one.tokens for one in asked] == [alone(prompt_of(10, seed), params) for seed in range(3)]


def test_the_first_admitted_is_never_preempted() -> None:
    engine = fake_engine(kv_memory=WHOLE)
    for seed in range(3):
        ask(engine, prompt_of(10, seed), SamplingParams(max_tokens=30))
    before = 0
    while engine._books.scheduler.get(0) is not None:
        engine.step()
        first = engine._books.scheduler.get(0)
        assert first is None or first.computed > before
        before = 0 if first is None else first.computed


def test_a_request_that_can_never_fit_is_refused_and_nothing_else() -> None:
    engine = fake_engine(kv_memory=20 * SIZE)
    fits = ask(engine, prompt_of(11), SamplingParams(max_tokens=10))  # 20 positions: the last token needs none
    with pytest.raises(InputError, match=r"compute\.kv_memory"):
        engine.add_request(prompt_of(11), SamplingParams(max_tokens=11))
    run_out(engine)
    assert fits.reasons == ["length"]
    counts = engine.counts()
    assert (counts.added, counts.refused) == (1, 1)


def test_bad_prompts_touch_nobody() -> None:
    engine = fake_engine()
    good = ask(engine, prompt_of(4), SamplingParams(max_tokens=3))
    for bad in ([], [VOCABULARY], [-1], prompt_of(CONTEXT)):
        with pytest.raises(PromptError):
            engine.add_request(bad, SamplingParams())
    run_out(engine)
    assert good.tokens == alone(prompt_of(4), SamplingParams(max_tokens=3))


def test_a_full_queue_says_so() -> None:
    engine = fake_engine(limits=Limits(waiting=2, running=1))
    for _ in range(2):
        ask(engine, prompt_of(4), SamplingParams(max_tokens=3))
    with pytest.raises(QueueFull, match="2 requests wait already"):
        engine.add_request(prompt_of(4), SamplingParams())
    engine.step()  # admits one
    ask(engine, prompt_of(4), SamplingParams(max_tokens=3))
    run_out(engine)
    assert engine.counts().ended["length"] == 3


def test_an_error_of_one_request_ends_this_one_alone() -> None:
    decoder = FakeDecoder(broken={5})
    engine = fake_engine(decoder)
    good = ask(engine, [1, 2, 3], SamplingParams(max_tokens=1))
    outputs: list[Output] = []
    engine.add_request([1, 5], SamplingParams(), deliver=outputs.append)

    class Raises:
        def choose(self, logits: torch.Tensor, text: object) -> int:
            raise ValueError("no")

    engine.add_request([1, 2], SamplingParams(), sampler=Raises(), deliver=outputs.append)
    run_out(engine)
    assert good.reasons == ["length"]
    assert [(type(one.error), one.token, one.finish_reason) for one in outputs] == [
        (NumericError, None, "error"),
        (ValueError, None, "error"),
    ]
    assert engine.counts().ended == {"stop": 0, "length": 1, "abort": 0, "error": 2}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 7, VOCABULARY - 1])
def test_one_logit_that_is_no_number_is_found_in_its_own_row(bad: float, place: int) -> None:
    logits = torch.randn(3, VOCABULARY)
    logits[1, place] = bad
    assert finite_rows(logits) == [True, False, True]
    assert finite_rows(logits[:0]) == []


def test_an_interruption_between_a_pass_and_its_tokens_loses_none() -> None:
    class Interrupted:
        times = 0

        def choose(self, logits: torch.Tensor, text: object) -> int:
            self.times += 1
            if self.times == 3:
                raise KeyboardInterrupt
            return int(logits.argmax())

    engine = fake_engine()
    one = Asked(prompt_of(6), SamplingParams(max_tokens=8), "", -1)
    engine.add_request(one.prompt, one.params, sampler=Interrupted(), deliver=one.take)
    other = ask(engine, prompt_of(5, 1), SamplingParams(max_tokens=8))
    with pytest.raises(KeyboardInterrupt):
        run_out(engine)
    run_out(engine)
    assert one.tokens == alone(one.prompt, one.params)
    assert other.tokens == alone(other.prompt, other.params)


def test_ten_thousand_aborted_requests_leave_nothing() -> None:
    engine = fake_engine(limits=Limits(running=8), kv_memory=4 * WHOLE)
    gc.collect()
    before = FakeCache.alive
    for index in range(10_000):
        number = engine.add_request(prompt_of(1 + index % 20), SamplingParams(), tenant=str(index % 7), salt="")
        if index % 3 == 0:
            engine.step()
        engine.abort(number)
        engine.forget()  # what it had computed is kept
        counts = engine.counts()
        assert (counts.waiting, counts.running, counts.kv_bytes, counts.kept_bytes) == (0, 0, 0, 0)
    assert engine.counts().ended["abort"] == 10_000
    gc.collect()
    assert FakeCache.alive == before
    scheduler = engine._books.scheduler
    for left in (scheduler._requests, scheduler._queues, scheduler._fair._given, engine._books._ends):
        assert not left


def test_a_request_aborted_in_the_middle_of_a_pass_is_gone_after_it() -> None:
    engine = fake_engine()
    one = ask(engine, prompt_of(4), SamplingParams(max_tokens=9))
    other = ask(engine, prompt_of(5), SamplingParams(max_tokens=9))

    class Aborts:
        def choose(self, logits: torch.Tensor, text: object) -> int:
            engine.abort(one.number)
            return int(logits.argmax())

    engine.add_request(prompt_of(6), SamplingParams(max_tokens=1), sampler=Aborts())
    engine.step()
    assert not one.tokens
    assert engine._books.scheduler.get(one.number) is None
    run_out(engine)
    assert other.tokens == alone(other.prompt, other.params)
    assert engine.counts().ended == {"stop": 0, "length": 2, "abort": 1, "error": 0}


def test_the_first_reason_to_end_counts() -> None:
    """Whoever stops an answer and then leaves it has not aborted it."""
    engine = fake_engine()
    one = ask(engine, prompt_of(20), SamplingParams(max_tokens=9), salt="")

    class Stops:
        def choose(self, logits: torch.Tensor, text: object) -> int:
            engine.stop(one.number)
            engine.abort(one.number)
            return int(logits.argmax())

    engine.add_request(prompt_of(6), SamplingParams(max_tokens=1), sampler=Stops())
    engine.step()
    assert engine.counts().ended == {"stop": 1, "length": 1, "abort": 0, "error": 0}
    assert len(engine._books.scheduler._prefixes) == 1


def test_an_abort_never_waits_for_the_books() -> None:
    """A finaliser may abort a request while its own thread holds the lock."""
    engine = fake_engine()
    one = ask(engine, prompt_of(4), SamplingParams(max_tokens=9))
    with engine._books.open():
        engine.abort(one.number)
        assert engine._books.scheduler.get(one.number) is not None
    assert engine._books.scheduler.get(one.number) is None


def test_failing_ends_every_request_with_its_error() -> None:
    engine = fake_engine(limits=Limits(running=1))
    outputs: list[Output] = []
    for _ in range(3):
        engine.add_request(prompt_of(4), SamplingParams(), deliver=outputs.append)
    engine.step()
    error = WorkerLost("went away")
    engine.fail(error)
    assert [output.error for output in outputs if output.error is not None] == [error] * 3
    assert not engine.has_work()


def test_a_conversation_that_goes_on_computes_what_is_new() -> None:
    decoder = FakeDecoder()
    engine = fake_engine(decoder)
    params = SamplingParams(max_tokens=4)
    first = ask(engine, prompt_of(20), params, salt="")
    run_out(engine)
    decoder.passes.clear()
    longer = [*first.prompt, *first.tokens, 1, 2, 3]
    second = ask(engine, longer, params, salt="")
    run_out(engine)
    assert decoder.passes[0] == [4 + 3]
    assert second.tokens == alone(longer, params)
    assert engine.counts().found_tokens == 20


def test_what_is_found_has_the_same_rotary_tables() -> None:
    """Positions of a prompt within the original context are rotated otherwise than those of a longer one."""
    rope = RopeConfig(10_000.0, "longrope", original_max_positions=40)
    engine = fake_engine(FakeDecoder(replace(TINY, rope=rope)))
    for length, found in ((30, 0), (40, 30), (41, 0), (50, 41)):
        before = engine.counts().found_tokens
        one = ask(engine, prompt_of(50)[:length], SamplingParams(max_tokens=2), salt="")
        run_out(engine)
        assert engine.counts().found_tokens - before == found
        assert one.tokens == alone(one.prompt, SamplingParams(max_tokens=2))


def test_a_cache_knows_how_long_its_prompt_is_before_all_of_it_is_there() -> None:
    begun: list[int] = []

    class Watching(FakeDecoder):
        def forward(self, batch: Batch[Any]) -> Steps[torch.Tensor]:
            begun.extend(cache.begun for cache in batch.caches)
            return super().forward(batch)

    engine = fake_engine(Watching(), limits=Limits(prefill_rows=4))
    ask(engine, prompt_of(3), SamplingParams(max_tokens=30))
    engine.step()
    ask(engine, prompt_of(20), SamplingParams(max_tokens=1))  # beside an answer, four rows at a time
    run_out(engine)
    assert set(begun) == {3, 20}
    assert begun.count(20) == 5


@dataclass
class Copies:
    """Watches copies of beginnings: the books are free meanwhile. ``during`` is called in the middle of each."""

    engine: Engine
    during: Callable[[], None] = lambda: None
    made: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, engine: Engine, patch: pytest.MonkeyPatch) -> Copies:
        copies, real = cls(engine), FakeCache.copy_from

        def copy_from(cache: FakeCache, other: FakeCache, length: int) -> None:
            assert not engine._books._lock.locked()
            assert engine.busy()
            engine.counts()  # for which the books are needed
            copies.during()
            real(cache, other, length)
            copies.made.append(length)

        patch.setattr(FakeCache, "copy_from", copy_from)
        return copies


def after(text: list[int], shared: int, length: int, seed: int = 1) -> list[int]:
    """A prompt that shares no more than its beginning with a text."""
    return [*text[:shared], (text[shared] + 1) % VOCABULARY, *prompt_of(length - shared - 1, seed)]


def kept_engine(decoder: FakeDecoder | None = None, *, length: int = 40, **options: Any) -> tuple[Engine, list[int]]:
    """An engine that has kept a cache, and the prompt that it is of."""
    engine = fake_engine(decoder, **options)
    text = prompt_of(length)
    ask(engine, text, SamplingParams(max_tokens=1), salt="")
    run_out(engine)
    return engine, text


def test_what_is_shared_is_copied_while_the_books_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = FakeDecoder()
    engine, text = kept_engine(decoder)
    copies = Copies.of(engine, monkeypatch)
    decoder.passes.clear()
    asked = [ask(engine, after(text, shared, 45), SamplingParams(max_tokens=3), salt="") for shared in (20, 30)]
    run_out(engine)
    assert sorted(copies.made) == [20, 30]
    assert decoder.passes[0] == [25, 15]
    for one in asked:
        assert one.tokens == alone(one.prompt, one.params)


@pytest.mark.parametrize("room", [120, 100])
def test_a_copy_comes_before_whoever_takes_its_source_in_the_same_step(
    monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """The kept cache is cut to 20 positions and written to, by a request for whose copy there is no room."""
    engine, text = kept_engine(kv_memory=room * SIZE)
    copies = Copies.of(engine, monkeypatch)
    params = SamplingParams(max_tokens=1)
    asked = [ask(engine, after(text, shared, 36, shared), params, salt="") for shared in (30, 20)]
    engine.step()
    assert copies.made == ([30, 20] if room == 120 else [30])
    assert engine.counts().found_tokens == 50
    assert [one.tokens for one in asked] == [alone(one.prompt, params) for one in asked]
    check_books(engine, room * SIZE)


def test_a_source_that_is_given_up_in_the_same_step_is_copied_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, text = kept_engine(kv_memory=100 * SIZE)
    copies = Copies.of(engine, monkeypatch)
    params = SamplingParams(max_tokens=1)
    shares, other = ask(engine, after(text, 30, 36), params, salt=""), ask(engine, prompt_of(40, 5), params)
    engine.step()
    assert copies.made == [30]
    assert engine.counts().found_tokens == 30
    assert [shares.tokens, other.tokens] == [alone(one.prompt, params) for one in (shares, other)]


def test_a_copy_that_fails_is_the_error_of_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, text = kept_engine()
    copies = Copies.of(engine, monkeypatch)

    def fail() -> None:
        raise MemoryError

    copies.during = fail
    outputs: list[Output] = []
    other = ask(engine, prompt_of(20, 3), SamplingParams(max_tokens=3), salt="x")
    engine.add_request(after(text, 30, 45), SamplingParams(), salt="", deliver=outputs.append)
    engine.step()
    assert [(type(one.error), one.finish_reason) for one in outputs] == [(MemoryError, "error")]
    assert engine.counts().ended["error"] == 1
    assert len(engine._books.scheduler._prefixes) == 1
    run_out(engine)
    assert other.tokens == alone(other.prompt, other.params)
    engine.forget()
    assert engine._books.scheduler._budget.used == 0


def test_an_interrupted_copy_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, text = kept_engine()
    copies = Copies.of(engine, monkeypatch)

    def interrupt() -> None:
        copies.during = lambda: None
        raise KeyboardInterrupt

    copies.during = interrupt
    asked = [ask(engine, after(text, shared, 45), SamplingParams(max_tokens=3), salt="") for shared in (20, 30)]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    run_out(engine)
    assert sorted(copies.made) == [20, 30]
    assert [one.tokens for one in asked] == [alone(one.prompt, one.params) for one in asked]


def test_a_pass_that_fails_after_a_copy_needs_no_other_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = FakeDecoder()
    engine, text = kept_engine(decoder)
    copies = Copies.of(engine, monkeypatch)
    decoder.fail = WorkerLost("went away")
    one = ask(engine, after(text, 30, 45), SamplingParams(max_tokens=3), salt="")
    with pytest.raises(WorkerLost):
        engine.step()
    run_out(engine)
    assert copies.made == [30]
    assert one.tokens == alone(one.prompt, one.params)


@pytest.mark.parametrize("interrupted", [False, True])
def test_who_is_aborted_during_its_copy_leaves_nothing_half_done(
    monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    engine, text = kept_engine()
    copies = Copies.of(engine, monkeypatch)
    one = ask(engine, after(text, 30, 45), SamplingParams(max_tokens=3), salt="")

    def leave() -> None:
        engine.abort(one.number)
        if interrupted:
            raise KeyboardInterrupt

    copies.during = leave
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    else:
        engine.step()
    assert not engine.has_work()
    assert engine.counts().kv_bytes == 0
    for kept in engine._books.scheduler._prefixes._kept.values():
        assert isinstance(kept.cache, FakeCache)
        assert kept.cache.tokens[: kept.cache.length] == kept.tokens.tolist()
    assert len(engine._books.scheduler._prefixes) == (1 if interrupted else 2)


@pytest.mark.parametrize(("tenant", "salt"), [("B", ""), ("A", "x"), ("A", None), ("", "A")])
def test_nothing_is_found_in_another_scope(tenant: str, salt: str | None) -> None:
    engine = fake_engine()
    ask(engine, prompt_of(30), SamplingParams(max_tokens=2), "A", "")
    run_out(engine)
    ask(engine, prompt_of(30), SamplingParams(max_tokens=2), tenant, salt)
    run_out(engine)
    assert engine.counts().found_tokens == 0


def test_stopped_is_complete_and_aborted_is_not() -> None:
    engine = fake_engine()
    for end in (engine.abort, engine.stop):
        one = ask(engine, prompt_of(20), SamplingParams(max_tokens=30), salt="")
        engine.step()
        end(one.number)
    assert engine.counts().ended == {"stop": 1, "length": 0, "abort": 1, "error": 0}


@pytest.mark.parametrize("steps", [0, 1, 3, 8])
def test_a_turn_that_is_aborted_leaves_what_it_had_found_and_computed(steps: int) -> None:
    """Stop, then Regenerate: in the middle of the prompt or of the answer, nothing is computed a second time."""
    decoder = FakeDecoder()
    engine = fake_engine(decoder, limits=Limits(prefill_rows=4))
    first = ask(engine, prompt_of(30), SamplingParams(max_tokens=4), salt="")
    run_out(engine)
    ask(engine, prompt_of(3), SamplingParams(max_tokens=60))  # beside it prompts are cut
    engine.step()
    longer, params = [*first.prompt, *first.tokens, *prompt_of(10, 1)], SamplingParams(max_tokens=9)  # 44 tokens
    stopped = ask(engine, longer, params, salt="")
    for _ in range(steps):
        engine.step()
    request = engine._books.scheduler.get(stopped.number)
    assert request is not None
    reached = max(30, min(request.computed, 43))  # the last token of a prompt is always computed
    engine.abort(stopped.number)
    decoder.passes.clear()
    again = ask(engine, longer, params, salt="")
    while not again.tokens:
        engine.step()
    assert sum(sum(rows[1:]) for rows in decoder.passes) == 44 - reached
    run_out(engine)
    assert again.tokens == alone(longer, params)


def test_an_abort_in_the_middle_of_a_pass_that_fails_leaves_what_was_there_before() -> None:
    class Aborts(FakeDecoder):
        def forward(self, batch: Batch[Any]) -> Steps[torch.Tensor]:
            if self.fail is not None:
                engine.abort(one.number)
            return super().forward(batch)

    decoder = Aborts()
    engine = fake_engine(decoder)
    one = ask(engine, prompt_of(20), SamplingParams(max_tokens=9), salt="")
    engine.step()
    engine.step()
    decoder.fail = WorkerLost("went away")
    with pytest.raises(WorkerLost):
        engine.step()
    again = ask(engine, one.prompt, one.params, salt="")
    run_out(engine)
    assert engine.counts().found_tokens == 19
    assert again.tokens == alone(one.prompt, one.params)


@pytest.mark.parametrize("end", ["abort", "stop"])
def test_an_error_leaves_nothing_whatever_else_was_asked(end: str) -> None:
    """Keys and values of a request whose logits are no numbers are not to be found."""

    class Ends(FakeDecoder):
        def forward(self, batch: Batch[Any]) -> Steps[torch.Tensor]:
            getattr(engine, end)(number)
            return super().forward(batch)

    engine = fake_engine(Ends(broken={5}))
    number = engine.add_request([5] * 20, SamplingParams(), salt="")
    engine.step()
    assert len(engine._books.scheduler._prefixes) == 0
    assert engine.counts().ended == {"stop": 0, "length": 0, "abort": 0, "error": 1}


class Reserve:
    """See ReservesPads: ``ready`` rows in all."""

    def __init__(self, ready: int) -> None:
        self.free = self.most = ready

    def reserve(self, rows: int) -> None:
        if rows > self.free:
            raise PadsExhausted("none")
        self.free -= rows

    def release(self, rows: int) -> None:
        self.free += rows


def test_pads_are_reserved_from_the_beginning_to_the_end() -> None:
    pads = Reserve(40)
    engine = fake_engine(pads=pads, kv_memory=2 * WHOLE)
    one = ask(engine, prompt_of(10), SamplingParams(max_tokens=5))  # 14 rows
    ask(engine, prompt_of(20), SamplingParams(max_tokens=7))  # 26 rows
    assert (pads.free, engine.most_promised, fake_engine().most_promised) == (0, 40, None)
    with pytest.raises(PadsExhausted):
        engine.add_request([1], SamplingParams(max_tokens=1))
    engine.step()
    assert pads.free == 30
    engine.abort(one.number)
    assert pads.free == 34
    run_out(engine)
    assert pads.free == 40
    assert engine.counts().preemptions == 0


def test_pads_are_reserved_and_steps_are_measured_under_the_lock_of_the_books(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads add and abort meanwhile; ``logits`` reserves too."""
    seen: list[bool] = []

    class Noting(Reserve):
        def reserve(self, rows: int) -> None:
            seen.append(engine._books._lock.locked())
            super().reserve(rows)

        def release(self, rows: int) -> None:
            seen.append(engine._books._lock.locked())
            super().release(rows)

    class Broken(FakeDecoder):
        def forward(self, batch: Batch[Any]) -> Steps[torch.Tensor]:
            raise NumericError("broken")

    pads = Noting(40)
    engine = fake_engine(Broken(), pads=pads)
    with pytest.raises(NumericError):
        engine.logits(prompt_of(10))
    assert (len(seen), pads.free) == (2, 40)

    engine = fake_engine(pads=pads)
    measured = engine._books.scheduler.measured

    def noting(answers: int, rows: int, seconds: float) -> None:
        seen.append(engine._books._lock.locked())
        measured(answers, rows, seconds)

    monkeypatch.setattr(engine._books.scheduler, "measured", noting)
    ask(engine, prompt_of(10), SamplingParams(max_tokens=2))
    run_out(engine)
    assert len(seen) > 5
    assert all(seen)


def test_with_reserved_pads_nobody_is_preempted() -> None:
    engine = fake_engine(pads=Reserve(10_000), kv_memory=WHOLE)
    asked = [ask(engine, prompt_of(10, seed), SamplingParams(max_tokens=30)) for seed in range(3)]
    run_out(engine)
    assert engine.counts().preemptions == 0
    assert [one.tokens for one in asked] == [alone(one.prompt, one.params) for one in asked]


@pytest.mark.parametrize("running", [1, 3])
def test_tenants_that_wait_are_served_alike(running: int) -> None:
    """One tenant asks for everything before the other comes; from then on neither gets ahead."""
    limits = Limits(running=running, prefill_rows=8, idle_rows=20)
    decoder = FakeDecoder()
    engine = fake_engine(decoder, limits=limits)
    served = {"A": 0, "B": 0}

    def rows_of(tenant: str) -> int:
        return engine._books.scheduler._fair._given.get(tenant, served[tenant])

    for index in range(60):
        ask(engine, prompt_of(10 + index % 3), SamplingParams(max_tokens=6), "A")
    for _ in range(10):
        engine.step()
    for index in range(30):
        ask(engine, prompt_of(5 + index % 9), SamplingParams(max_tokens=3), "B")
    bound = limits.idle_rows + 18 + running * 6
    while "A" in engine._books.scheduler._queues and "B" in engine._books.scheduler._queues:
        engine.step()
        assert abs(rows_of("A") - rows_of("B")) <= bound
    assert "A" in engine._books.scheduler._queues  # who asked for less is done first


def test_a_large_request_is_not_overtaken_for_ever() -> None:
    engine = fake_engine(kv_memory=WHOLE)
    ask(engine, prompt_of(8, 1), SamplingParams(max_tokens=20), "small")
    engine.step()
    large = ask(engine, prompt_of(60), SamplingParams(max_tokens=3), "large")
    for index in range(50):
        ask(engine, prompt_of(8, index), SamplingParams(max_tokens=20), f"tenant {index}")
        engine.step()
    assert large.tokens


def test_callers_of_several_threads_move_each_other() -> None:
    engine = fake_engine()
    params = SamplingParams(max_tokens=12)
    begin = threading.Barrier(4)
    answers: dict[int, list[int]] = {}

    def work(seed: int) -> None:
        begin.wait()
        answers[seed] = [output.token or 0 for _, output in engine.generate([prompt_of(5, seed)], params)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {seed: alone(prompt_of(5, seed), params) for seed in range(4)}


def test_a_caller_that_leaves_takes_its_requests_along() -> None:
    engine = fake_engine()
    with Caller(engine) as caller:
        caller.add(prompt_of(4), SamplingParams())
        caller.add(prompt_of(5), SamplingParams())
        next(iter(caller))
    assert not engine.has_work()
    assert engine.counts().ended["abort"] == 2


def test_a_caller_may_stop_one_of_its_requests() -> None:
    engine = fake_engine()
    params = SamplingParams(max_tokens=9)
    tokens: dict[int, list[int]] = {0: [], 1: []}
    with Caller(engine) as caller:
        for seed in range(2):
            caller.add(prompt_of(4, seed), params)
        for place, output in caller:
            tokens[place].append(output.token or 0)
            if place == 0 and len(tokens[0]) == 3:
                caller.stop(output)
    assert tokens == {0: alone(prompt_of(4, 0), params)[:3], 1: alone(prompt_of(4, 1), params)}
    assert engine.counts().ended == {"stop": 1, "length": 1, "abort": 0, "error": 0}
