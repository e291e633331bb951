"""A perplexity counts every token but the first exactly once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.families import random_tokens, tiny_model
from tsqp.cli.evaluate import text_perplexity, windows
from tsqp.errors import NumericError


@given(st.integers(2, 300), st.integers(2, 50), st.data())
def test_every_token_is_scored_once_with_its_context(count: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window - 1))
    scored: list[int] = []
    for part in windows(count, window, stride):
        assert 0 <= part.first < part.scored < part.end <= min(count, part.first + window)
        scored += range(part.scored, part.end)
        assert part.scored - part.first >= min(part.scored, window - stride)
    assert scored == list(range(1, count))


def test_one_window_is_the_textbook_formula() -> None:
    model, ids = tiny_model("llama"), random_tokens(60)
    losses = torch.nn.functional.cross_entropy(model.logits(ids)[:-1], torch.tensor(ids[1:]))
    assert text_perplexity(lambda part: model.logits(list(part)), ids, 64, 32) == pytest.approx(
        math.exp(float(losses)), rel=1e-5
    )


def test_a_uniform_model_has_as_many_choices_as_words() -> None:
    def uniform(ids: Sequence[int]) -> torch.Tensor:
        return torch.zeros(len(ids), 320)

    assert text_perplexity(uniform, random_tokens(100), 16, 8) == pytest.approx(320.0)


def test_logits_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(NumericError):
        text_perplexity(lambda ids: torch.full((len(ids), 320), float("nan")), random_tokens(10), 16, 8)
