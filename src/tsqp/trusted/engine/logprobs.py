"""Log-probabilities of tokens, in the model's own distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

FLOOR = -9999.0  # instead of minus infinity, which JSON cannot write


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probability (natural, at least -9999) of a token, and those of the likeliest tokens in its place.

    ``top``: pairs of a token id and its log-probability, the likeliest first; of equal ones the smaller id first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def token_logprobs(logits: torch.Tensor, token: int, count: int) -> TokenLogprobs:
    """What the softmax of logits (vocab_size,) gives to ``token`` and to the ``count`` likeliest tokens.

    The logits are the model's: no bias, penalty, temperature or grammar has changed them.
    """
    given = logits.numpy()
    scores = log_softmax(given)
    top = tuple((int(one), bounded(scores[one])) for one in likeliest(given, count))
    return TokenLogprobs(token, bounded(scores[token]), top)


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """The log-probability of each token."""
    scores = logits.astype(np.float64)
    scores -= scores.max()
    scores -= np.log(np.exp(scores).sum())
    return scores


def read_prompt(
    entries: list[TokenLogprobs | None],
    logits: torch.Tensor,
    prompt: Sequence[int],
    first: int,
    count: int,
    look: Callable[[torch.Tensor, int, int], TokenLogprobs] = token_logprobs,
) -> None:
    """Add to the entries of a prompt what its logits (T, vocab_size), after the tokens from ``first`` on, give them.

    Rows that come again, after a preemption, and that of the last token add nothing.
    """
    for at, row in enumerate(logits, start=first + 1):
        if at == len(entries) < len(prompt):
            entries.append(look(row, prompt[at], count))


def likeliest(scores: NDArray[Any], count: int) -> NDArray[np.intp]:
    """The ids of the ``count`` highest scores, highest first; of equal ones the smaller id first."""
    count = min(count, len(scores))
    if not count:
        return np.empty(0, dtype=np.intp)
    ids = np.flatnonzero(scores >= kth_largest(scores, count))  # more than count, where some are equal
    return ids[np.argsort(-scores[ids], kind="stable")[:count]]


def kth_largest(scores: NDArray[Any], k: int) -> Any:
    """The k-th largest of all scores, 1 for the largest."""
    return np.partition(scores, len(scores) - k)[len(scores) - k]


def bounded(logprob: float) -> float:
    """At least ``FLOOR``."""
    return max(float(logprob), FLOOR)
