"""A sampler whose reads and writes of arrays are the same whatever the logits and the tokens are.

Every operation here goes over the whole vocabulary, as often as the parameters and the vocabulary's size say: whoever
watches which memory is touched learns the parameters and the length of the text. Tokens and bits are those of
``sampling.Sampler``. There, sums that decide are of whole numbers, so that order and gaps do not matter to them.

Covers: bias, penalties, temperature, ``top_k``, ``top_p``, ``min_p``, the draw, log-probabilities
(tests/trusted/engine/test_oblivious.py). Does not cover: the grammar of a structured output, which walks a tree of
tokens; stop strings, and the text itself; a chosen token as a number of Python's; the time that each step takes.
Assumes: numpy's elementwise loops, sums and ``cumsum`` go through memory in order (its ``exp`` reads a table where the
processor has no AVX-512). Its ``where`` does not: of each element it reads the one value that it takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tsqp.model.oblivious_loops import count_tokens
from tsqp.trusted.engine.logprobs import TokenLogprobs, bounded, log_softmax
from tsqp.trusted.engine.sampling import History, Sampler, Scores, mass_scale, tempered
from tsqp.trusted.engine.sampling_params import SamplingParams

Mask = NDArray[np.bool_]


class ObliviousSampler(Sampler):
    """See ``Sampler``: the same tokens."""

    _bias_of_all: NDArray[np.float64] | None = None  # one number for each token, made once

    def _biased(self, scores: NDArray[np.float64]) -> None:
        if self._bias_of_all is None:
            self._bias_of_all = np.zeros(len(scores))
            for token, value in (self._params.logit_bias or {}).items():
                self._bias_of_all += value * _is(len(scores), token)
        scores += self._bias_of_all

    def _new_history(self, vocab_size: int) -> History:
        prompt_tokens = self._prompt_tokens or 0
        return ObliviousHistory(vocab_size, prompt_tokens, reads_prompt=self._params.repetition_penalty != 1.0)

    def _largest(self, scores: Scores) -> int:
        return first_of(scores == scores.max())

    def _drawn(self, scores: Scores, share: float) -> int:
        weights = kept_weights(scores, self._params)
        sums = np.cumsum(weights)
        return int(np.count_nonzero(sums <= share * sums[-1]))

    def _logprobs_of(self, logits: torch.Tensor, token: int, count: int) -> TokenLogprobs:
        return oblivious_logprobs(logits, token, count)


class ObliviousHistory(History):
    """See ``History``. The prompt is passed over where no penalty asks for it: each token costs a pass."""

    def __init__(self, vocab_size: int, prompt_tokens: int, *, reads_prompt: bool) -> None:
        super().__init__(vocab_size, prompt_tokens)
        self._times_in_text = np.zeros(vocab_size, dtype=np.int64) if reads_prompt else None

    def follow(self, text: Sequence[int]) -> None:
        if self._times_in_text is not None:
            count_tokens(np.array(text[self._read :], np.int64), self._times_in_text)
        count_tokens(np.array(text[max(self._read, self._prompt_tokens) :], np.int64), self._in_answer)
        self._read = len(text)

    def penalise(self, scores: NDArray[np.float64], params: SamplingParams) -> None:
        if self._times_in_text is not None:
            penalty = params.repetition_penalty
            changed = either(scores > 0, scores / penalty, scores * penalty)
            scores[...] = either(self._times_in_text > 0, changed, scores)
        if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
            less = scores - (params.frequency_penalty * self._in_answer + params.presence_penalty)
            scores[...] = either(self._in_answer > 0, less, scores)


def compile_loops() -> None:
    """Compile what the first penalty of an answer would wait for, and every answer beside it."""
    count_tokens(np.zeros(1, np.int64), np.zeros(1, np.int64))


def kept_weights(scores: Scores, params: SamplingParams) -> NDArray[np.float64]:
    """What ``sampling.narrowed`` says of tokens to choose among: the weight of each, and 0 of all others."""
    weights = tempered(scores, params.temperature)
    if 0 < params.top_k < len(scores):
        weights *= scores >= kth_largest(scores, params.top_k)
    if params.top_p < 1.0:
        weights *= nucleus(weights, params.top_p)
    if params.min_p > 0.0:
        weights *= weights >= params.min_p
    return weights


def kth_largest(scores: Scores, k: int) -> float:
    """The k-th largest, from 1, by as many counts as a score has bits."""
    keys = _ordered(scores)
    bounds = np.iinfo(keys.dtype)
    low, high = int(bounds.min), int(bounds.max) + 1  # at least k are from low on, and fewer from high on
    for _ in range(bounds.bits):
        middle = (low + high) // 2
        if np.count_nonzero(keys >= keys.dtype.type(middle)) >= k:
            low = middle
        else:
            high = middle
    return float(_ordered(np.array([low], keys.dtype).view(scores.dtype)).view(scores.dtype)[0])


def nucleus(weights: NDArray[np.float64], top_p: float) -> Mask:
    """Which tokens ``sampling.nucleus`` keeps, of weights of which the largest is 1.

    Looks for the least weight before which there is too little mass, by one sum for each bit that it may have.
    """
    scale = mass_scale(len(weights))
    masses, keys = np.floor(weights * scale), weights.view(np.int64)  # of positive floats, the order of bits is theirs
    wanted = math.ceil(top_p * float(masses.sum()))
    low, high = (int(np.float64(one).view(np.int64)) for one in (1.0 / scale, 1.0))
    low -= 1  # here all that has any mass comes before, which is too much; before 1 there is none
    for _ in range((high - low).bit_length()):
        middle = (low + high) // 2
        if float((masses * (keys > middle)).sum()) < wanted:
            high = middle
        else:
            low = middle
    before, each = int((masses * (keys > high)).sum()), math.floor(float(np.int64(high).view(np.float64)) * scale)
    equal = keys == high
    count = -(-(wanted - before) // each)  # of equal ones the first
    kept: Mask = (keys > high) | (equal & (np.cumsum(equal) <= count))
    return kept


def oblivious_logprobs(logits: torch.Tensor, token: int, count: int) -> TokenLogprobs:
    """See ``logprobs.token_logprobs``."""
    given = logits.numpy()
    scores = log_softmax(given)
    ids = np.arange(len(given))
    top: list[tuple[int, float]] = []
    left, taken = np.ones(len(given), dtype=bool), np.full_like(given, -np.inf)
    for _ in range(min(count, len(given))):
        # Minus infinity stands for what is taken, and may be a logit too: only what is left counts.
        largest = either(left, given, taken).max()
        one = first_of(left & (given == largest))
        top.append((one, bounded(value_at(scores, one))))
        left &= ids != one
    return TokenLogprobs(token, bounded(value_at(scores, token)), tuple(top))


def first_of(marked: Mask) -> int:
    """The first index that is marked; the length, where none is."""
    before_end = np.arange(len(marked), 0, -1)
    return len(marked) - int((before_end * marked).max(initial=0))


def value_at(values: NDArray[np.float64], index: int) -> float:
    """One element."""
    bits = values.view(np.int64) & _bits_of(_is(len(values), index), 8)
    return float(np.bitwise_or.reduce(bits).view(np.float64))


def either(mask: Mask, one: Scores, other: Scores) -> Scores:
    """``one`` where the mask holds, else ``other``, floats of one width: of both every element is read."""
    bits = _bits_of(mask, one.itemsize)
    chosen: Scores = ((one.view(bits.dtype) & bits) | (other.view(bits.dtype) & ~bits)).view(one.dtype)
    return chosen


def _bits_of(mask: Mask, width: int) -> NDArray[Any]:
    """Integers of ``width`` bytes: all bits where the mask holds, else none."""
    bits: NDArray[Any] = -mask.astype(f"i{width}")
    return bits


def _is(size: int, index: int) -> Mask:
    """True at one index."""
    marked: Mask = np.arange(size, dtype=np.int32) == index
    return marked


def _ordered(floats: NDArray[Any]) -> NDArray[Any]:
    """Integers in the order of floats; of those integers, seen as floats, the integers are the bits of the floats."""
    width = floats.dtype.itemsize
    bits = floats.view(np.dtype(f"i{width}"))
    most = np.iinfo(bits.dtype).max
    ordered: NDArray[Any] = bits ^ ((bits >> (8 * width - 1)) & most)
    return ordered
