"""From logits to the next token. The sampler, its seed and its choices never leave the trusted side.

One order of steps, that of transformers and, but for min-p, of vLLM:

1. log-probabilities, where they are asked for, are those of the logits as they come;
2. ``logit_bias`` is added;
3. tokens that the grammar of ``structured_outputs`` does not allow are left out;
4. ``repetition_penalty``, then ``frequency_penalty`` and ``presence_penalty``;
5. at temperature 0 the largest logit is taken, of equal ones the smallest id, and that is all;
6. logits are divided by ``temperature``;
7. ``top_k``, then ``top_p`` of what is left, then ``min_p``;
8. one number from 0 to 1, made of the seed and the position in the answer alone, picks the token.

A choice depends on the logits of its own row and on its own request. What changes logits computes in float64, sums go
by token id in one thread: the same on every run, whatever runs beside it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tsqp.trusted.engine.logprobs import TokenLogprobs, kth_largest, token_logprobs
from tsqp.trusted.engine.sampling_params import SamplingParams

_BITS_WITHIN_A_BIN = 44  # of a float64: 256 bins for each power of two

Scores = NDArray[Any]  # (vocab_size,), float32 as they come and float64 after a change


class TokenMatcher(Protocol):
    """The grammar of one answer: which tokens may come next."""

    def allowed(self) -> NDArray[np.bool_]:
        """(vocab_size,). Raises InputError where nothing may come, or where that took too long to find out."""

    def accept(self, token: int) -> None:
        """The next token of the answer, one of those allowed."""

    def reset(self) -> None:
        """Back to the beginning of the answer."""


class Sampler:
    """Chooses the tokens of one sequence.

    ``prompt_tokens``: how many tokens of the text are the prompt; when not given, those of the first call.
    ``matcher``: the grammar of this answer, for this sampler alone.
    """

    def __init__(
        self, params: SamplingParams, *, prompt_tokens: int | None = None, matcher: TokenMatcher | None = None
    ) -> None:
        self._params = params
        self._prompt_tokens = prompt_tokens
        self._matcher = matcher
        self._accepted: int | None = 0  # tokens of the answer that the grammar has; None: an interrupt left that open
        self._key = secrets.token_bytes(16) if params.seed is None else params.seed.to_bytes(8, "little", signed=True)
        self._history: History | None = None
        self.logprobs: list[TokenLogprobs] = []  # of the tokens so far, where they are asked for
        self._bias: tuple[NDArray[np.intp], NDArray[np.float64]] | None = None

    def choose(self, logits: torch.Tensor, text: Sequence[int]) -> int:
        """The next token from logits (vocab_size,), float32; ``text`` holds every token so far.

        Its log-probabilities are added to ``logprobs``. Raises InputError when the grammar cannot go on. A choice that
        was interrupted is made again, for the same text, as if it had not been: a token counts once it is in the text.
        """
        params = self._params
        if self._prompt_tokens is None:
            self._prompt_tokens = len(text)
        answer = len(text) - self._prompt_tokens
        del self.logprobs[answer:]
        if self._matcher is not None:
            self._go_on(self._matcher, text[self._prompt_tokens :])
        scores = self._changed(logits.numpy(), text)
        token = self._largest(scores) if params.temperature == 0.0 else self._drawn(scores, uniform(self._key, answer))
        if params.logprobs is not None:
            self.logprobs.append(self._logprobs_of(logits, token, params.logprobs))
        return token

    def _go_on(self, matcher: TokenMatcher, answer: Sequence[int]) -> None:
        begin, self._accepted = self._accepted, None
        if begin is None:
            matcher.reset()
            begin = 0
        for token in answer[begin:]:
            matcher.accept(token)
        self._accepted = len(answer)

    def _changed(self, scores: Scores, text: Sequence[int]) -> Scores:
        """Logits after bias, grammar and penalties; the same array where there are none."""
        params = self._params
        if not params.logit_bias and self._matcher is None and not _penalises(params):
            return scores
        scores = scores.astype(np.float64)
        if params.logit_bias:
            self._biased(scores)
        if self._matcher is not None:
            scores[...] = np.where(self._matcher.allowed(), scores, -np.inf)
        if _penalises(params):
            history, self._history = self._history or self._new_history(len(scores)), None  # an interrupt drops it
            history.follow(text)
            history.penalise(scores, params)
            self._history = history
        return scores

    # What follows looks at some tokens alone. ``ObliviousSampler`` does the same by looks at all.

    def _biased(self, scores: NDArray[np.float64]) -> None:
        if self._bias is None:
            biases = self._params.logit_bias or {}
            self._bias = np.array(list(biases)), np.array(list(biases.values()))
        ids, values = self._bias
        scores[ids] += values

    def _new_history(self, vocab_size: int) -> History:
        return History(vocab_size, self._prompt_tokens or 0)

    def _largest(self, scores: Scores) -> int:
        return int(scores.argmax())

    def _drawn(self, scores: Scores, share: float) -> int:
        ids, weights = narrowed(scores, self._params)
        at = pick(weights, share)
        return at if ids is None else int(ids[at])

    def _logprobs_of(self, logits: torch.Tensor, token: int, count: int) -> TokenLogprobs:
        return token_logprobs(logits, token, count)


def _penalises(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0


class History:
    """Which tokens were in the text so far, and how often in the answer."""

    def __init__(self, vocab_size: int, prompt_tokens: int) -> None:
        self._in_text = np.zeros(vocab_size, dtype=bool)
        self._in_answer = np.zeros(vocab_size, dtype=np.int64)
        self._prompt_tokens = prompt_tokens
        self._read = 0

    def follow(self, text: Sequence[int]) -> None:
        """Count the tokens that are new since the last call."""
        self._in_text[np.array(text[self._read :], dtype=np.intp)] = True
        answer = text[max(self._read, self._prompt_tokens) :]
        np.add.at(self._in_answer, np.array(answer, dtype=np.intp), 1)
        self._read = len(text)

    def penalise(self, scores: NDArray[np.float64], params: SamplingParams) -> None:
        """Make tokens of the text less likely, or more for penalties of the other sign. Changes ``scores``."""
        if params.repetition_penalty != 1.0:
            seen = np.flatnonzero(self._in_text)
            penalty, before = params.repetition_penalty, scores[seen]
            scores[seen] = np.where(before > 0, before / penalty, before * penalty)
        if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
            seen = np.flatnonzero(self._in_answer)
            scores[seen] -= params.frequency_penalty * self._in_answer[seen] + params.presence_penalty


def narrowed(scores: Scores, params: SamplingParams) -> tuple[NDArray[np.intp] | None, NDArray[np.float64]]:
    """The tokens to choose among, by id (None: all), and their weights, of which the largest is 1.

    A weight is a probability but for one common factor. Weights are of logits divided by the temperature.
    """
    ids, vocab_size = None, len(scores)
    if 0 < params.top_k < len(scores):
        ids = np.flatnonzero(scores >= kth_largest(scores, params.top_k))  # all that are as likely as the k-th
        scores = scores[ids]
    weights = tempered(scores, params.temperature)
    if params.top_p < 1.0:
        inside = nucleus(weights, params.top_p, vocab_size)
        ids, weights = inside if ids is None else ids[inside], weights[inside]
    if params.min_p > 0.0:
        inside = np.flatnonzero(weights >= params.min_p)
        ids, weights = inside if ids is None else ids[inside], weights[inside]
    return ids, weights


def tempered(scores: Scores, temperature: float) -> NDArray[np.float64]:
    """``exp((scores - max) / temperature)``: at most 1, so nothing overflows, at any temperature above 0."""
    weights = scores.astype(np.float64)
    weights -= weights.max()
    with np.errstate(over="ignore"):  # to minus infinity, which is meant: a tiny temperature leaves the maximum
        weights /= temperature
    np.exp(weights, out=weights)
    return weights


def mass_scale(vocab_size: int) -> float:
    """What weights are multiplied by, to be cut to whole numbers: sums of them all are exact, in whatever order."""
    return 2.0 ** (53 - vocab_size.bit_length())


def nucleus(weights: NDArray[np.float64], top_p: float, vocab_size: int | None = None) -> NDArray[np.intp]:
    """Ids, in order, of the likeliest tokens: each stays while the mass before it is below ``top_p`` of the whole.

    The likeliest comes first, of equal ones the smaller id; so one always stays. ``vocab_size``: when weights are of a
    part of the tokens.
    """
    scale = mass_scale(vocab_size or len(weights))
    masses = np.floor(weights * scale)
    whole = float(masses.sum())
    # Tokens below this weight together have less than what may be left out, by half: the others are candidates.
    candidates = np.flatnonzero(masses >= 0.5 * (1.0 - top_p) / len(weights) * whole)
    found, masses = weights[candidates], masses[candidates]
    # To sort them all would take the most time. So they go into bins by size, which the first bits of a positive
    # float tell, and only the bin is sorted in which the mass is reached.
    bins = found.view(np.int64) >> _BITS_WITHIN_A_BIN
    bins -= bins.min()
    sums = np.cumsum(np.bincount(bins, weights=masses)[::-1])  # the largest weights first
    last = min(int(np.searchsorted(sums, top_p * whole)), len(sums) - 1)
    before = sums[last - 1] if last else 0.0
    last = len(sums) - 1 - last
    ordered = np.sort(found[bins == last])[::-1]
    count = min(int(np.searchsorted(before + np.cumsum(np.floor(ordered * scale)), top_p * whole)), len(ordered) - 1)
    stays = found > ordered[count]
    equal = np.flatnonzero(found == ordered[count])
    stays[equal[: count + 1 - int((ordered > ordered[count]).sum())]] = True
    inside: NDArray[np.intp] = candidates[stays]
    return inside


def pick(weights: NDArray[np.float64], share: float) -> int:
    """The index where the running sum of the weights first exceeds a share of the whole, 0 to below 1."""
    sums = np.cumsum(weights)
    # The largest share is 1 - 2^-53, and its product with a float64 is rounded to a smaller one: never to the whole.
    return int(np.searchsorted(sums, share * sums[-1], side="right"))


def uniform(key: bytes, position: int) -> float:
    """A number from 0 to below 1, of 53 bits, that depends on the key and the position alone."""
    digest = blake2b(position.to_bytes(8, "little"), key=key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
