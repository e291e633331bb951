"""Loops between numbers mod p and 8-bit digits; ``digits_torch.py`` says the same in plain torch.

A digit d in [-128, 127] is kept as the byte d + 128, which one kind of product wants; the others flip its top bit.
"""

from __future__ import annotations

import numpy as np

from tsqp.arith.jit import inline, kernel
from tsqp.arith.modulus import MAX_CENTRED, P

_P, _HALF = np.int64(P), np.int64(MAX_CENTRED)
_OFFSET = np.int64(0x80808080)  # 128 for each digit: the bytes of v + offset are the balanced digits of v, plus 128
MULTIPLE = np.int64(P << 26)  # of p, larger than any weighted sum of digits' products: makes it positive


@inline
def reduced(total):  # type: ignore[no-untyped-def]
    """int64 from 0 to 2⁵⁸ mod p: uint32. A word of 31 bits and what is above it weigh the same."""
    value = (total & _P) + (total >> np.int64(31))
    value = (value & _P) + (value >> np.int64(31))  # at most p
    return np.uint32(0) if value == _P else np.uint32(value)


@kernel
def split(x, digits, first, end):  # type: ignore[no-untyped-def]
    """x (T, K), uint32 below p or int16 within ±32,639, to as many digits as it has bytes: uint8 (digits, T, K)."""
    for row in range(first, end):
        for m in range(digits.shape[0]):  # outermost, so that the loop over the row is one of vectors
            for j in range(x.shape[1]):
                value = np.int64(x[row, j])
                value = (value - _P if value > _HALF else value) + _OFFSET
                digits[m, row, j] = np.uint8(value >> np.int64(8 * m))


@kernel
def join(sums, offsets, out, first, end):  # type: ignore[no-untyped-def]
    """Sums int32 (digits, T, N) less offsets (N,), weighted by 256ᵐ, mod p: out uint32 (T, N)."""
    total = np.empty(out.shape[1], np.int64)
    for row in range(first, end):
        total[:] = MULTIPLE
        for m in range(sums.shape[0]):
            for j in range(out.shape[1]):  # in int32: sum and offset may both have wrapped around
                total[j] += np.int64(np.int32(sums[m, row, j] - offsets[j])) << np.int64(8 * m)
        for j in range(out.shape[1]):
            out[row, j] = reduced(total[j])


@kernel
def clear_top_bits(words):  # type: ignore[no-untyped-def]
    """Words uint32 (n,) to 31 bits each; the greatest of them."""
    greatest = np.uint32(0)
    for i in range(words.shape[0]):
        words[i] = np.uint32(words[i] & np.uint32(_P))  # the cast keeps numba in 32 bits
        greatest = max(greatest, words[i])
    return greatest
