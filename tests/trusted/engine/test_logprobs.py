"""Log-probabilities, with torch's log_softmax in float64 as the oracle."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.prompt_logprobs import prompt_logprobs
from tsqp import SamplingParams
from tsqp.trusted.engine.logprobs import (
    FLOOR,
    TokenLogprobs,
    likeliest,
    read_prompt,
    token_logprobs,
)
from tsqp.trusted.engine.sampling import Sampler

LOGITS = st.lists(st.sampled_from([-1e38, -50.0, -1.0, 0.0, 0.5, 0.5000001, 3.0, 1e38]), min_size=1, max_size=40)


@given(LOGITS, st.integers(0, 20), st.data())
def test_they_are_those_of_the_softmax_and_never_below_the_floor(
    given_logits: list[float], count: int, data: st.DataObject
) -> None:
    logits = torch.tensor(given_logits)
    token = data.draw(st.integers(0, len(logits) - 1))
    expected = logits.double().log_softmax(-1).clamp(min=FLOOR)
    found = token_logprobs(logits, token, count)
    assert found.token == token
    assert found.logprob == pytest.approx(float(expected[token]), abs=1e-9)
    order = sorted(range(len(logits)), key=lambda one: (-given_logits[one], one))[:count]
    assert [one for one, _ in found.top] == order
    assert [value for _, value in found.top] == pytest.approx([float(expected[one]) for one in order], abs=1e-9)
    assert json.loads(json.dumps(found.top)) == [list(pair) for pair in found.top]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(0, 40))
def test_the_likeliest_of_equal_ones_are_the_first(scores: list[int], count: int) -> None:
    order = sorted(range(len(scores)), key=lambda one: (-scores[one], one))
    assert likeliest(np.array(scores, dtype=np.float32), count).tolist() == order[:count]


def test_an_unlikely_token_has_the_floor() -> None:
    assert token_logprobs(torch.tensor([0.0, -20_000.0]), 1, 2).logprob == FLOOR == -9999.0
    assert token_logprobs(torch.tensor([0.0, -20_000.0]), 0, 2).top == ((0, 0.0), (1, FLOOR))


def test_bias_penalties_and_temperature_change_the_choice_and_not_the_log_probabilities() -> None:
    logits = torch.tensor([0.0, math.log(3.0)])
    params = SamplingParams(temperature=0.1, logit_bias={0: 50.0}, presence_penalty=1.0, top_k=1, logprobs=2)
    sampler = Sampler(params)
    assert sampler.choose(logits, [1]) == 0
    (found,) = sampler.logprobs
    assert found.logprob == pytest.approx(math.log(0.25))
    assert [token for token, _ in found.top] == [1, 0]


def test_none_are_made_unless_they_are_asked_for() -> None:
    sampler = Sampler(SamplingParams())
    assert sampler.choose(torch.tensor([0.0, 1.0]), [0]) == 1
    assert sampler.logprobs == []


@given(st.integers(1, 12), st.lists(st.integers(0, 11), max_size=6))
def test_a_prompt_that_is_read_in_parts_some_of_them_again_has_the_same(length: int, starts: list[int]) -> None:
    prompt = [(7 * at + 3) % 9 for at in range(length)]
    logits = torch.randn(length, 9, generator=torch.Generator().manual_seed(2))
    entries: list[TokenLogprobs | None] = [None]
    for start in [*starts, *range(length)]:  # a gap is not read over
        read_prompt(entries, logits[start : start + 3], prompt, start, 2)
    assert entries == prompt_logprobs(logits, prompt, 2)
