"""Chi-square tests of the null hypothesis that captured words are independent and uniform below a modulus.

Five statistics (Knuth, The Art of Computer Programming 2, §3.3), each on up to 4,096 bins of 8 expected words or more:

- high bits and low bits of each word;
- the high bits of neighbours in a row, as pairs;
- the difference mod m of neighbours in a column, high and low bits: what is left where one pad serves two rows.

The result is the least of their p-values times their number (Bonferroni): small when any of them is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tsqp.audit.view import WordRows, Words

MAX_BITS = 12
LEAST_EXPECTED = 8
MAX_ELEMENTS = 1 << 24

Counts = np.ndarray[Any, np.dtype[np.int64]]
Shares = np.ndarray[Any, np.dtype[np.float64]]


def uniformity_p(words: WordRows) -> float:
    """The p-value, 0 to 1. A word that is not below the modulus makes it 0. Raises ValueError for too few words."""
    groups = list(_bounded(words.groups))
    if any(int(group.max()) >= words.modulus for group in groups if group.size):
        return 0.0
    steps = _differences(groups, words.modulus)
    tests = (
        _test(groups, words.modulus, high_bits, high_shares),
        _test(groups, words.modulus, _low, _low_shares),
        _pair_test(groups, words.modulus),
        _test(steps, words.modulus, high_bits, high_shares),
        _test(steps, words.modulus, _low, _low_shares),
    )
    values = [p for p in tests if p is not None]
    if not values:
        raise ValueError(f"{sum(group.size for group in groups)} words are too few for a test of uniformity")
    return min(1.0, len(values) * min(values))


def chi_square_p(counts: Counts, shares: Shares) -> float:
    """The chance that uniform words are at least as far from ``shares`` (adding up to 1) as ``counts`` are."""
    expected = shares * counts.sum()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    half = torch.tensor([(len(counts) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def _test(
    groups: Sequence[Words],
    modulus: int,
    bins_of: Callable[[Words, int, int], Words],
    shares_of: Callable[[int, int], Shares],
) -> float | None:
    bits = _bits(sum(group.size for group in groups), modulus)
    if not bits:
        return None
    counts = sum(np.bincount(bins_of(group.ravel(), bits, modulus), minlength=1 << bits) for group in groups)
    return chi_square_p(np.asarray(counts), shares_of(bits, modulus))


def _pair_test(groups: Sequence[Words], modulus: int) -> float | None:
    half = _bits(sum(len(group) * (group.shape[1] // 2) for group in groups), modulus) // 2
    if not half:
        return None
    counts = np.zeros(1 << 2 * half, np.int64)
    for group in groups:
        even = group.shape[1] // 2 * 2
        high = high_bits(group[:, :even].ravel(), half, modulus).astype(np.int64)
        counts += np.bincount(high[::2] << half | high[1::2], minlength=len(counts))
    shares = high_shares(half, modulus)
    return chi_square_p(counts, np.outer(shares, shares).ravel())


def high_bits(words: Words, bits: int, modulus: int) -> Words:
    """The highest bits of each word, of those that numbers below the modulus have."""
    return words >> words.dtype.type(_width(modulus) - bits)


def _low(words: Words, bits: int, _: int) -> Words:
    return words & words.dtype.type((1 << bits) - 1)


def high_shares(bits: int, modulus: int) -> Shares:
    """How many of all uniform words have each value of their highest bits: (2^bits,).

    Exact: p = 2³¹ − 1 leaves the last bin one number short.
    """
    size = 1 << _width(modulus) - bits
    first = np.arange(1 << bits, dtype=np.int64) * size
    return np.clip(modulus - first, 0, size) / modulus


def _low_shares(bits: int, modulus: int) -> Shares:
    residues = np.arange(1 << bits, dtype=np.int64)
    return (modulus // (1 << bits) + (residues < modulus % (1 << bits))) / modulus


def _differences(groups: Sequence[Words], modulus: int) -> list[Words]:
    """Each row less the one before it, mod m, in each group."""
    steps = (np.diff(group.astype(np.int64), axis=0) for group in groups if len(group) > 1)
    return [np.mod(step, modulus).astype(np.uint32) for step in steps]


def _bits(words: int, modulus: int) -> int:
    """As many bits as leave every bin its expected words; 0 for none."""
    return min(MAX_BITS, _width(modulus), max(0, (words // LEAST_EXPECTED).bit_length() - 1))


def _width(modulus: int) -> int:
    return (modulus - 1).bit_length()


def _bounded(groups: Sequence[Words]) -> Iterator[Words]:
    """Groups up to ``MAX_ELEMENTS`` words together; at least a row of each, so that every group is looked at."""
    share = MAX_ELEMENTS // max(1, len(groups))
    for group in groups:
        yield group[: max(1, share // max(1, group.shape[1]))]
