"""The test of uniformity accepts uniform words and finds each way in which masks have gone wrong elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tsqp.arith.modulus import P
from tsqp.audit.uniformity import chi_square_p, uniformity_p
from tsqp.audit.view import WordRows

ROWS, COLUMNS = 64, 1024
CLEAR = 1e-9

Words = np.ndarray[Any, np.dtype[np.uint32]]


def pads(seed: int = 0, rows: int = ROWS) -> Words:
    return np.random.Generator(np.random.PCG64(seed)).integers(0, P, (rows, COLUMNS), dtype=np.uint32)


def p_of(*groups: np.ndarray[Any, Any], modulus: int = P) -> float:
    return uniformity_p(WordRows(list(groups), modulus))


def small_numbers(rows: int = ROWS) -> Words:
    """What activations look like in F_p before they are masked."""
    values = np.random.Generator(np.random.PCG64(1)).normal(0, 4000, (rows, COLUMNS)).astype(np.int64)
    return np.mod(values, P).astype(np.uint32)


def test_uniform_words_give_uniform_p_values() -> None:
    values = [p_of(pads(seed), pads(seed + 1000)) for seed in range(40)]
    assert min(values) > 0.05 / 40 / 10
    assert sum(value < 0.5 for value in values) < 35


def test_the_chi_square_distribution_is_that_of_the_tables() -> None:
    # 90 and 110 of two equal bins: chi² = 2 with one degree of freedom.
    assert chi_square_p(np.array([90, 110]), np.array([0.5, 0.5])) == pytest.approx(0.157299, abs=1e-6)
    # chi² = 9.2 with two degrees of freedom: e^-4.6.
    counts = np.array([100 + 6, 100 + 20, 100 - 26])
    statistic = float(((counts - 100) ** 2).sum() / 100)
    assert chi_square_p(counts, np.full(3, 1 / 3)) == pytest.approx(float(np.exp(-statistic / 2)))


def test_words_in_clear_are_found() -> None:
    assert p_of(small_numbers()) < CLEAR


def test_masked_words_are_not() -> None:
    masked = (pads().astype(np.int64) + small_numbers()) % P
    assert p_of(masked.astype(np.uint32)) > 1e-4


def test_a_pad_used_for_two_rows_is_found() -> None:
    pad = np.repeat(pads(rows=ROWS // 2), 2, axis=0).astype(np.int64)
    masked = (pad + small_numbers()) % P
    assert p_of(masked.astype(np.uint32)) < CLEAR


def test_noise_too_narrow_for_the_field_is_found() -> None:
    assert p_of(pads() & np.uint32(2**30 - 1)) < CLEAR


def test_noise_of_floats_is_found() -> None:
    noise = np.random.Generator(np.random.PCG64(2)).normal(0, 1, (ROWS, COLUMNS)).astype(np.float32)
    assert p_of(noise.view(np.uint32), modulus=2**32) < CLEAR


def test_a_mask_shared_by_neighbouring_columns_is_found() -> None:
    assert p_of(np.repeat(pads()[:, ::2], 2, axis=1)) < CLEAR


def test_low_bits_that_stay_are_found() -> None:
    assert p_of(pads() // np.uint32(16) * np.uint32(16)) < CLEAR


def test_one_word_that_is_not_canonical_is_enough() -> None:
    words = pads()
    words[3, 5] = P
    assert p_of(words) == 0.0


def test_bits_narrower_than_the_bins_are_tested_too() -> None:
    keys = np.frombuffer(np.random.Generator(np.random.PCG64(3)).bytes(32 * 4096), np.uint8).reshape(-1, 32)
    assert p_of(keys, modulus=256) > 1e-4
    assert p_of(keys & np.uint8(0x7F), modulus=256) < CLEAR


def test_too_few_words_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        p_of(pads()[:1, :4])
