"""The sampler, with transformers' logits processors as the oracle."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tsqp import SamplingParams
from tsqp.errors import OptionError
from tsqp.trusted.engine.sampling import Sampler, narrowed, penalised

VOCAB = 50


def random_logits(seed: int) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def kept(logits: torch.Tensor) -> set[int]:
    return set(torch.isfinite(logits).nonzero().flatten().tolist())


@given(st.integers(0, 10_000), st.integers(1, VOCAB))
def test_top_k_keeps_what_transformers_keeps(seed: int, k: int) -> None:
    logits = random_logits(seed)
    expected = TopKLogitsWarper(k)(None, logits[None])[0]
    assert kept(narrowed(logits, SamplingParams(top_k=k))) == kept(expected)


@given(st.integers(0, 10_000), st.floats(0.01, 0.99))
def test_top_p_keeps_what_transformers_keeps(seed: int, p: float) -> None:
    logits = random_logits(seed)
    expected = TopPLogitsWarper(p)(None, logits[None])[0]
    assert kept(narrowed(logits, SamplingParams(top_p=p))) == kept(expected)


@given(st.integers(0, 10_000), st.floats(0.001, 0.99))
def test_min_p_keeps_what_transformers_keeps(seed: int, p: float) -> None:
    logits = random_logits(seed)
    expected = MinPLogitsWarper(p)(None, logits[None])[0]  # type: ignore[arg-type]
    assert kept(narrowed(logits, SamplingParams(min_p=p))) == kept(expected)


@given(st.integers(0, 10_000), st.floats(0.5, 2.0), st.lists(st.integers(0, VOCAB - 1), min_size=1))
def test_repetition_penalty(seed: int, penalty: float, text: list[int]) -> None:
    logits = random_logits(seed)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([text]), logits[None].clone())[0]
    torch.testing.assert_close(penalised(logits, text, penalty), expected)


def test_greedy_takes_the_most_likely_token() -> None:
    logits = random_logits(1)
    assert Sampler(SamplingParams()).choose(logits, [0]) == int(logits.argmax())


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    def draws(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
        return [sampler.choose(random_logits(1), [0]) for _ in range(50)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)


def test_without_a_seed_draws_differ() -> None:
    def draws() -> list[int]:
        sampler = Sampler(SamplingParams(temperature=5.0))
        return [sampler.choose(torch.zeros(VOCAB), [0]) for _ in range(50)]

    assert draws() != draws()


def test_temperature_is_the_distribution_it_says() -> None:
    logits = torch.tensor([0.0, math.log(2.0), math.log(4.0)])
    sampler = Sampler(SamplingParams(temperature=2.0, seed=1))
    counts = Counter(sampler.choose(logits, [0]) for _ in range(6000))
    weights = [1.0, math.sqrt(2.0), 2.0]
    for token, weight in enumerate(weights):
        assert abs(counts[token] / 6000 - weight / sum(weights)) < 0.03


@given(st.integers(0, 10_000), st.floats(0.0, 1e-30, exclude_min=True), st.sampled_from([0.01, 1.0, 100.0]))
def test_a_tiny_temperature_is_greedy(seed: int, temperature: float, penalty: float) -> None:
    logits = random_logits(seed) * 1e37  # sums and products of such logits leave float32
    params: dict[str, Any] = {"repetition_penalty": penalty, "seed": seed}
    greedy = Sampler(SamplingParams(**params)).choose(logits, [0])
    narrowings: list[dict[str, Any]] = [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}]
    for narrowing in narrowings:
        sampler = Sampler(SamplingParams(temperature=temperature, **narrowing, **params))
        assert sampler.choose(logits, [0]) == greedy


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": math.inf},
        {"repetition_penalty": math.nan},
        {"stop_token_ids": (3, -1)},
        {"stop": ("",)},
        {"seed": 2**70},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(wrong: dict[str, object]) -> None:
    (name,) = wrong
    with pytest.raises(OptionError, match=name):
        SamplingParams(**wrong)  # type: ignore[arg-type]
