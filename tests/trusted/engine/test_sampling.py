"""The sampler, with transformers' logits processors as the oracle."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tsqp import SamplingParams
from tsqp.trusted.engine.logprobs import TokenLogprobs
from tsqp.trusted.engine.oblivious import ObliviousHistory, ObliviousSampler
from tsqp.trusted.engine.sampling import History, Sampler, narrowed, nucleus, pick, uniform

VOCAB = 50
WEIGHTS = st.lists(st.sampled_from([0.0, 1e-300, 1e-9, 0.1, 0.1 + 2.0**-50, 0.25, 0.5, 1.0]), min_size=1, max_size=60)


def random_logits(seed: int, size: int = VOCAB) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def kept(logits: torch.Tensor, **params: Any) -> set[int]:
    """Ids that may be drawn."""
    ids, weights = narrowed(logits.numpy(), SamplingParams(temperature=1.0, **params))
    ids = np.arange(len(logits)) if ids is None else ids
    return set(ids[weights > 0].tolist())


def finite(logits: torch.Tensor) -> set[int]:
    return set(torch.isfinite(logits).nonzero().flatten().tolist())


class Only:
    """A grammar that allows the same tokens again and again."""

    def __init__(self, *tokens: int) -> None:
        self._allowed = np.isin(np.arange(VOCAB), tokens)
        self.accepted: list[int] = []

    def allowed(self) -> NDArray[np.bool_]:
        return self._allowed

    def accept(self, token: int) -> None:
        assert self._allowed[token]
        self.accepted.append(token)

    def reset(self) -> None:
        self.accepted.clear()


@given(st.integers(0, 10_000), st.integers(1, VOCAB))
def test_top_k_keeps_what_transformers_keeps(seed: int, k: int) -> None:
    logits = random_logits(seed)
    assert kept(logits, top_k=k) == finite(TopKLogitsWarper(k)(None, logits[None])[0])


@given(st.integers(0, 10_000), st.floats(0.01, 0.99), st.sampled_from([VOCAB, 3000]))
def test_top_p_keeps_what_transformers_keeps(seed: int, p: float, size: int) -> None:
    logits = random_logits(seed, size).double()  # so that sums are as exact as ours
    assert kept(logits, top_p=p) == finite(TopPLogitsWarper(p)(None, logits[None])[0])


@given(st.integers(0, 10_000), st.floats(0.001, 0.99))
def test_min_p_keeps_what_transformers_keeps(seed: int, p: float) -> None:
    logits = random_logits(seed)
    assert kept(logits, min_p=p) == finite(MinPLogitsWarper(p)(None, logits[None])[0])  # type: ignore[arg-type]


@given(st.integers(0, 10_000), st.integers(2, 20), st.floats(0.3, 0.99), st.floats(0.01, 0.5))
def test_top_k_comes_before_top_p_and_top_p_before_min_p(seed: int, k: int, p: float, min_p: float) -> None:
    logits = random_logits(seed).double()
    expected = TopKLogitsWarper(k)(None, logits[None])
    expected = TopPLogitsWarper(p)(None, expected)
    expected = MinPLogitsWarper(min_p)(None, expected)  # type: ignore[arg-type]
    assert kept(logits, top_k=k, top_p=p, min_p=min_p) == finite(expected[0])


@given(WEIGHTS, st.floats(0.0, 1.0, exclude_min=True))
def test_the_nucleus_is_the_shortest_prefix_of_a_stable_order(given_weights: list[float], p: float) -> None:
    """Also where weights are equal, differ in the last bits, or are nothing beside the largest."""
    weights = np.array([*given_weights, 1.0])
    order = sorted(range(len(weights)), key=lambda one: (-weights[one], one))
    needed, mass = 0, 0.0
    while needed < len(order) and mass < p * math.fsum(weights) * (1 - 1e-12):
        mass += weights[order[needed]]
        needed += 1
    found = nucleus(weights, p).tolist()
    assert found == sorted(order[: len(found)])
    within = math.fsum(weights[found]) - p * math.fsum(weights)
    assert len(found) == needed or abs(within) < 1e-9  # the bound itself, within what float64 tells apart


@given(st.integers(0, 10_000), st.floats(0.5, 2.0), st.lists(st.integers(0, VOCAB - 1), min_size=1))
def test_repetition_penalty(seed: int, penalty: float, text: list[int]) -> None:
    logits = random_logits(seed)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([text]), logits[None].clone())[0]
    sampler = Sampler(SamplingParams(repetition_penalty=penalty))
    assert sampler.choose(logits, text) == int(expected.argmax())


def test_frequency_and_presence_penalties_are_those_of_the_api_and_count_the_answer_alone() -> None:
    prompt, answer = [3] * 20, [1, 1, 2]
    logits = torch.tensor([0.0, 5.0, 5.0, 3.0])
    sampler = Sampler(SamplingParams(frequency_penalty=0.5, presence_penalty=1.5), prompt_tokens=len(prompt))
    # 1: 5 - 2·0.5 - 1.5 = 2.5; 2: 5 - 0.5 - 1.5 = 3; 3 was in the prompt only and stays 3 + a little.
    assert sampler.choose(logits + torch.tensor([0.0, 0.0, 0.0, 0.01]), prompt + answer) == 3
    assert sampler.choose(logits + torch.tensor([0.0, 0.0, 0.01, 0.0]), [*prompt, *answer]) == 2
    assert sampler.choose(logits, [*prompt, *answer, 2, 2, 3]) == 1  # 2: 5 - 3·0.5 - 1.5 = 2; 3: 3 - 0.5 - 1.5 = 1
    twice_and_once = Sampler(SamplingParams(frequency_penalty=0.5, presence_penalty=1.5), prompt_tokens=len(prompt))
    assert twice_and_once.choose(torch.tensor([0.0, 5.0, 4.6, 0.0]), [*prompt, *answer]) == 2  # 2.6 against 2.5


def test_a_penalty_below_0_makes_tokens_of_the_answer_likelier() -> None:
    sampler = Sampler(SamplingParams(frequency_penalty=-1.0), prompt_tokens=1)
    assert sampler.choose(torch.tensor([1.0, 0.5]), [0]) == 0
    assert sampler.choose(torch.tensor([1.0, 0.5]), [0, 1]) == 1


def test_a_bias_is_added_before_penalties() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0])
    assert Sampler(SamplingParams(logit_bias={2: 2.5})).choose(logits, [0]) == 2
    assert Sampler(SamplingParams(logit_bias={0: -100, 1: -100.0})).choose(logits, [0]) == 2
    # The bias makes the logit of 2 positive (2.5), so it is divided: 1.25; multiplied before the bias it would win.
    both = SamplingParams(logit_bias={2: 2.5}, repetition_penalty=2.0)
    assert Sampler(both).choose(torch.tensor([2.0, 1.0, 0.0]), [2]) == 0


def test_only_what_the_grammar_allows_is_chosen_whatever_else_is_asked_for() -> None:
    every: list[dict[str, Any]] = [{}, {"logit_bias": {0: 100.0, 1: 100.0}}, {"repetition_penalty": 2.0}]
    every += [{"temperature": 2.0, **more} for more in ({}, {"top_k": 20}, {"top_p": 0.999}, {"min_p": 0.001})]
    for params in every:
        matcher = Only(7, 9)
        sampler = Sampler(SamplingParams(seed=1, **params), matcher=matcher)
        text = [0]
        for seed in range(40):
            text.append(sampler.choose(random_logits(seed), text))
        assert set(text[1:]) <= {7, 9}
        assert matcher.accepted == text[1:-1], "the last one once something is to come after it"


def interrupted_after(call: Any) -> Any:
    """The call, after whose work an interrupt comes."""

    def interrupted(*arguments: Any) -> None:
        call(*arguments)
        raise KeyboardInterrupt

    return interrupted


@pytest.mark.parametrize("kind", [Sampler, ObliviousSampler])
def test_a_choice_that_is_interrupted_is_made_again_as_if_it_had_not_been(
    kind: type[Sampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(interrupted: int | None) -> tuple[list[int], list[int], list[TokenLogprobs]]:
        params = SamplingParams(temperature=2.0, seed=1, logprobs=2, frequency_penalty=0.5)
        matcher, text = Only(*range(0, VOCAB, 3)), [0, 5]
        sampler = kind(params, prompt_tokens=2, matcher=matcher)
        for position in range(6):
            ended = 0
            parts = (
                (matcher, "accept"),
                (sampler, "_changed"),
                (History, "follow"),
                (History, "penalise"),
                (ObliviousHistory, "follow"),
                (ObliviousHistory, "penalise"),
                (sampler, "_logprobs_of"),
            )
            for place, part in parts if position == interrupted else ():
                with monkeypatch.context() as patch:
                    patch.setattr(place, part, interrupted_after(getattr(place, part)))
                    try:
                        sampler.choose(random_logits(position), text)
                    except KeyboardInterrupt:
                        ended += 1
            if position == interrupted:
                assert ended == (5 if position else 4), "the history of this kind; no token to accept at first"
                sampler.choose(random_logits(position), text)  # interrupted before anybody has the token
            text.append(sampler.choose(random_logits(position), text))
        return text, matcher.accepted, sampler.logprobs

    expected = answer(None)
    assert all(answer(position) == expected for position in range(6))
    assert [one.token for one in expected[2]] == expected[0][2:]


def test_the_logits_are_not_changed() -> None:
    logits = random_logits(1)
    before = logits.clone()
    params = SamplingParams(
        temperature=1.0, logit_bias={1: 3.0}, frequency_penalty=1.0, repetition_penalty=2.0, logprobs=3
    )
    Sampler(params, matcher=Only(1, 2)).choose(logits, [0])
    assert torch.equal(logits, before)


def test_greedy_takes_the_most_likely_token_and_of_equal_ones_the_first() -> None:
    logits = random_logits(1)
    assert Sampler(SamplingParams()).choose(logits, [0]) == int(logits.argmax())
    assert Sampler(SamplingParams()).choose(torch.tensor([0.0, 2.0, 1.0, 2.0]), [0]) == 1


def draws(seed: int | None, count: int = 50, **params: Any) -> list[int]:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=seed, **params))
    return [sampler.choose(random_logits(1), [0] * (position + 1)) for position in range(count)]


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(-7) != draws(7)
    assert draws(2**63 - 1) != draws(-(2**63))


def test_a_seeded_token_depends_on_logits_and_position_alone() -> None:
    """Not on what was drawn before: a sequence that is taken up again at any place goes on as it would have done."""
    whole = draws(7)
    for position in range(0, 50, 7):
        again = Sampler(SamplingParams(temperature=1.0, seed=7), prompt_tokens=1)
        assert again.choose(random_logits(1), [0] * (position + 1)) == whole[position]
        longer = Sampler(SamplingParams(temperature=1.0, seed=7), prompt_tokens=30)
        assert longer.choose(random_logits(1), [0] * (position + 30)) == whole[position], "not on the prompt's length"


def test_seeded_tokens_stay_those_of_earlier_versions() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=7), prompt_tokens=0)
    chosen = [sampler.choose(torch.arange(50.0) / 25, range(position)) for position in range(12)]
    assert chosen == [35, 47, 19, 48, 49, 37, 46, 8, 38, 40, 15, 44]


def test_without_a_seed_draws_differ() -> None:
    def without() -> list[int]:
        sampler = Sampler(SamplingParams(temperature=2.0))
        return [sampler.choose(torch.zeros(VOCAB), [0] * (position + 1)) for position in range(50)]

    assert without() != without()


def test_temperature_is_the_distribution_it_says() -> None:
    logits = torch.tensor([0.0, math.log(2.0), math.log(4.0)])
    sampler = Sampler(SamplingParams(temperature=2.0, seed=1), prompt_tokens=0)
    counts = Counter(sampler.choose(logits, range(position)) for position in range(6000))
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


@given(WEIGHTS.filter(any), st.floats(0.0, 1.0, exclude_max=True))
def test_what_is_picked_has_a_weight_and_its_share_of_the_whole(given_weights: list[float], share: float) -> None:
    weights = np.array(given_weights)
    at = pick(weights, share)
    assert weights[at] > 0
    sums = np.cumsum(weights)
    assert (sums[at - 1] if at else 0.0) <= share * sums[-1] or share > 1 - 1e-9
    assert sums[at] > share * sums[-1] or sums[at] == sums[-1]


def test_the_last_share_below_1_picks_the_last_token_with_a_weight() -> None:
    assert pick(np.array([1.0, 0.1, 0.0]), 1 - 2.0**-53) == 1
    assert pick(np.array([0.0, 1.0]), 0.0) == 1


@given(st.binary(min_size=1, max_size=64), st.integers(0, 2**63 - 1))
def test_shares_are_below_1(key: bytes, position: int) -> None:
    assert 0.0 <= uniform(key, position) < 1.0


def test_shares_are_spread_evenly() -> None:
    shares = np.array([uniform(b"key", position) for position in range(4000)])
    counts, _ = np.histogram(shares, bins=10, range=(0, 1))
    assert counts.min() > 320  # 400 ± 4 standard deviations of 19
    assert abs(np.corrcoef(shares[:-1], shares[1:])[0, 1]) < 0.06


def test_ties_at_the_kth_place_all_stay() -> None:
    assert kept(torch.tensor([1.0, 0.0, 1.0, 1.0]), top_k=1) == {0, 2, 3}


@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}], ids=str)
def test_equal_logits_are_no_trouble(params: dict[str, Any]) -> None:
    chosen = [
        Sampler(SamplingParams(temperature=1.0, seed=seed, **params)).choose(torch.zeros(VOCAB), [0])
        for seed in range(200)
    ]
    assert len(set(chosen)) > 15
    assert max(chosen) < (25 if "top_p" in params else VOCAB)  # of equal ones the first make up the mass
