"""Requests with taps have passes of their own, and nobody waits longer for that than for any other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trusted.engine.fakes import SIZE, FakeDecoder, alone, fake_engine
from tsqp.errors import WorkerLost
from tsqp.model.pending import Steps
from tsqp.trusted.engine.engine import Engine
from tsqp.trusted.engine.limits import Limits
from tsqp.trusted.engine.sampling_params import SamplingParams
from tsqp.trusted.tap import Tap, Taps


@dataclass
class TappedDecoder(FakeDecoder):
    """Notes of each pass who listens to it, from which position on, and the tokens that it has."""

    taps: Taps = field(default_factory=Taps)
    seen: list[tuple[Tap | None, int, list[list[int]], bool]] = field(default_factory=list)

    def forward(self, batch: Any) -> Steps[torch.Tensor]:
        tap = self.taps.current
        position = -1 if tap is None else tap._position
        self.seen.append((tap, position, [list(tokens) for tokens in batch.tokens], batch.call_by_call))
        return (yield from super().forward(batch))

    def of(self, tap: Tap | None) -> list[list[list[int]]]:
        """The tokens of each pass that this one has listened to, or that nobody has."""
        return [tokens for one, _, tokens, _ in self.seen if one is tap]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [(seed * 11 + row * 3 + row * row) % 40 for row in range(length)]


def run_out(engine: Engine) -> None:
    for _ in range(2_000):
        if not engine.has_work():
            return
        engine.step()
    raise AssertionError("requests that do not end")


ASKED = st.tuples(
    st.integers(1, 20),  # tokens of the prompt
    st.integers(1, 12),  # of the answer
    st.sampled_from("abc"),  # the tenant
    st.booleans(),  # whether it has a tap
    st.booleans(),  # whether it is patient
    st.integers(0, 6),  # steps before it comes
)


@settings(max_examples=60)
@given(
    asked=st.lists(ASKED, min_size=1, max_size=7),
    memory=st.sampled_from([None, 36 * SIZE, 60 * SIZE]),
    slots=st.integers(1, 4),
    prefill=st.sampled_from([None, 1, 5]),
    losses=st.sets(st.integers(0, 60), max_size=3),
)
def test_a_tap_hears_its_own_request_and_every_answer_is_that_of_its_request_alone(
    asked: list[tuple[int, int, str, bool, bool, int]],
    memory: int | None,
    slots: int,
    prefill: int | None,
    losses: set[int],
) -> None:
    decoder = TappedDecoder()
    engine = fake_engine(decoder, kv_memory=memory, limits=Limits(running=slots, prefill_rows=prefill))
    answers: dict[int, list[int]] = {}
    tapped: dict[int, Tap] = {}
    steps = 0

    def step() -> None:
        nonlocal steps
        decoder.fail = WorkerLost("went away") if steps in losses else None
        steps += 1
        try:
            engine.step()
        except WorkerLost:
            assert decoder.taps.current is None
        decoder.fail = None

    for number, (length, tokens, tenant, with_tap, patient, later) in enumerate(asked):
        for _ in range(later):
            step()
        answers[number] = []
        tap = tapped[number] = decoder.taps.new()

        def deliver(output: Any, answer: list[int] = answers[number]) -> None:
            answer.append(output.token)

        engine.add_request(
            prompt_of(length, number),
            SamplingParams(max_tokens=tokens),
            tenant=tenant,
            salt="",
            patient=patient,
            deliver=deliver,
            tap=tap if with_tap else None,
        )
    while engine.has_work():
        step()
        assert steps < 2_000, "requests that do not end"
    for number, (length, tokens, *_) in enumerate(asked):
        assert answers[number] == alone(prompt_of(length, number), SamplingParams(max_tokens=tokens))
    for listener, position, rows, call_by_call in decoder.seen:
        assert call_by_call == (listener is not None)
        if listener is not None:
            (number,) = [number for number, one in tapped.items() if one is listener]
            whole = prompt_of(asked[number][0], number) + answers[number]
            assert rows == [whole[position:][: len(rows[0])]]
    for number, (length, tokens, _, with_tap, *_) in enumerate(asked):
        heard = {
            position + row
            for listener, position, rows, _ in decoder.seen
            if listener is tapped[number]
            for row in range(len(rows[0]))
        }
        assert heard == (set(range(length + tokens - 1)) if with_tap else set()), "all of it, from its first token"


def test_others_have_every_second_pass_and_their_prompts_are_not_held_up() -> None:
    decoder = TappedDecoder()
    engine = fake_engine(decoder)
    engine.add_request(prompt_of(4), SamplingParams(max_tokens=10), tap=decoder.taps.new())
    for seed in (1, 2):
        engine.add_request(prompt_of(3, seed), SamplingParams(max_tokens=10))
    run_out(engine)
    listened = [tap is not None for tap, *_ in decoder.seen]
    # Their prompts, and a step of theirs to be measured; then each in turn, until they have ended.
    assert listened == [False] + [False, True] * 9 + [True]
    assert decoder.passes[0] == [3, 3]


def test_a_prompt_with_a_tap_is_taken_in_parts_beside_answers_that_somebody_follows() -> None:
    parts: dict[bool, list[list[int]]] = {}
    for patient in (False, True):
        decoder = TappedDecoder()
        engine = fake_engine(decoder, limits=Limits(prefill_rows=4))
        engine.add_request(prompt_of(2), SamplingParams(max_tokens=20), patient=patient)
        engine.step()
        tap = decoder.taps.new()
        engine.add_request(prompt_of(10, 1), SamplingParams(max_tokens=2), tap=tap)
        run_out(engine)
        parts[patient] = [[len(tokens) for tokens in rows] for rows in decoder.of(tap)]
    assert parts == {False: [[4], [4], [2], [1]], True: [[10], [1]]}


def test_a_long_prompt_with_a_tap_is_taken_in_parts_beside_nobody() -> None:
    parts = {}
    for length in (16, 17):
        decoder = TappedDecoder()
        engine = fake_engine(decoder, limits=Limits(idle_rows=8))
        tap = decoder.taps.new()
        engine.add_request(prompt_of(length), SamplingParams(max_tokens=1), tap=tap)
        run_out(engine)
        parts[length] = [len(tokens) for (tokens,) in decoder.of(tap)]
    assert parts == {16: [16], 17: [8, 9]}


def test_the_pace_of_a_prompt_with_a_tap_is_learnt_from_its_own_passes() -> None:
    """A step of the answer takes as long as twelve rows of the prompt: so many are taken between two, once learnt."""
    now = 0.0
    decoder = TappedDecoder()
    real = decoder.forward

    def forward(batch: Any) -> Steps[torch.Tensor]:
        nonlocal now
        rows = sum(len(tokens) for tokens in batch.tokens)
        now += 1.0 if rows == 1 else rows / 12
        return (yield from real(batch))

    decoder.forward = forward  # type: ignore[method-assign]
    engine = fake_engine(decoder, clock=lambda: now)
    engine.add_request(prompt_of(1), SamplingParams(max_tokens=60))
    engine.step()
    tap = decoder.taps.new()
    engine.add_request(prompt_of(60, 1), SamplingParams(max_tokens=1), tap=tap)
    run_out(engine)
    assert [len(rows[0]) for rows in decoder.of(tap)] == [6, 12, 18, 12, 12]


def test_nothing_kept_is_taken_and_nothing_is_left() -> None:
    decoder = TappedDecoder()
    engine = fake_engine(decoder)
    prompt, params = prompt_of(20), SamplingParams(max_tokens=2)
    tap = decoder.taps.new()
    for one in (None, tap, None):
        engine.add_request(prompt, params, salt="s", tap=one)
        run_out(engine)
    assert decoder.of(tap) == [[prompt], [[decoder.of(tap)[1][0][0]]]]
    counts = engine.counts()
    assert counts.found_tokens == 19  # of the third request, in what the first has left
    assert counts.kept_bytes > 0
    engine.forget()
    engine.add_request(prompt, params, salt="s", tap=tap)
    run_out(engine)
    assert engine.counts().kept_bytes == 0


def test_an_abort_in_the_middle_of_its_pass_ends_it_and_the_tap_is_off() -> None:
    decoder = TappedDecoder()
    engine = fake_engine(decoder)
    tap = decoder.taps.new()
    number = engine.add_request(prompt_of(5), SamplingParams(max_tokens=9), tap=tap)
    real = decoder.forward

    def forward(batch: Any) -> Steps[torch.Tensor]:
        assert decoder.taps.current is tap
        engine.abort(number)
        return (yield from real(batch))

    decoder.forward = forward  # type: ignore[method-assign]
    assert engine.step()
    assert decoder.taps.current is None
    counts = engine.counts()
    assert (counts.ended["abort"], counts.running, counts.kv_bytes) == (1, 0, 0)
