"""The log-probabilities of a whole prompt at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tsqp.trusted.engine.logprobs import TokenLogprobs, token_logprobs


def prompt_logprobs(logits: torch.Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprobs | None]:
    """One entry for each of T tokens, from the logits (T, vocab_size) after each of them; None for the first."""
    after = [token_logprobs(row, token, count) for row, token in zip(logits[:-1], tokens[1:], strict=True)]
    return [None, *after]
