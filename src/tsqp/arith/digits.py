"""Loops between numbers mod p and 8-bit digits; ``field.py`` says what each computes, also in plain torch.

A digit d in [-128, 127] is kept as the byte d + 128, with its top bit flipped where the product wants it signed.
"""

from __future__ import annotations

import numpy as np

from tsqp.arith.jit import kernel

_P = np.uint64(2**31 - 1)
_HALF = np.uint32(2**30 - 1)  # (p - 1) / 2
_OFFSET = np.uint32(0x80808080)  # 128 for each digit: the bytes of v + offset are the balanced digits of v, plus 128
_SHIFT = np.uint64(31)
_MULTIPLE = np.int64((2**31 - 1) << 26)  # of p, larger than any sum below: makes it positive


@kernel
def split_field(x, digits, first, end):  # type: ignore[no-untyped-def]
    """x uint32 (T, K) canonical, to digits uint8 (4, T, K), the lowest first."""
    for row in range(first, end):
        for j in range(x.shape[1]):
            value = x[row, j]
            if value > _HALF:  # centred: value - p, in two's complement
                value -= np.uint32(_P)
            value += _OFFSET
            digits[0, row, j] = np.uint8(value)
            digits[1, row, j] = np.uint8(value >> np.uint32(8))
            digits[2, row, j] = np.uint8(value >> np.uint32(16))
            digits[3, row, j] = np.uint8(value >> np.uint32(24))


@kernel
def split_small(x, digits, first, end):  # type: ignore[no-untyped-def]
    """x int16 (T, K) of at most 32,639, to digits uint8 (2, T, K), the lowest first."""
    for row in range(first, end):
        for j in range(x.shape[1]):
            value = np.uint32(np.int32(x[row, j])) + _OFFSET
            digits[0, row, j] = np.uint8(value)
            digits[1, row, j] = np.uint8(value >> np.uint32(8))


@kernel
def join_field(sums, offsets, out, first, end):  # type: ignore[no-untyped-def]
    """Sums int32 (4, T, N) less offsets (N,), weighted by 256ᵐ, mod p: out uint32 (T, N)."""
    for row in range(first, end):
        for j in range(out.shape[1]):
            offset = offsets[j]
            total = _MULTIPLE + np.int64(np.int32(sums[0, row, j] - offset))
            total += np.int64(np.int32(sums[1, row, j] - offset)) << np.int64(8)
            total += np.int64(np.int32(sums[2, row, j] - offset)) << np.int64(16)
            total += np.int64(np.int32(sums[3, row, j] - offset)) << np.int64(24)
            value = np.uint64(total)  # below 2⁵⁸
            value = (value & _P) + (value >> _SHIFT)
            value = (value & _P) + (value >> _SHIFT)  # at most p
            out[row, j] = np.uint32(0) if value == _P else np.uint32(value)


@kernel
def join_small(sums, offsets, out, first, end):  # type: ignore[no-untyped-def]
    """Sums int32 (2, T, N) less offsets (N,), the second times 256: out int32 (T, N)."""
    for row in range(first, end):
        for j in range(out.shape[1]):
            low = np.int32(sums[0, row, j] - offsets[j])
            out[row, j] = np.int32(low + np.int32(np.int32(sums[1, row, j] - offsets[j]) << np.int32(8)))


@kernel
def clear_top_bits(words, first, end):  # type: ignore[no-untyped-def]
    """Words uint32 (n,) to 31 bits each; the number of those that are p."""
    count = 0
    for i in range(first, end):
        word = words[i] & np.uint32(_P)
        words[i] = word
        count += word == np.uint32(_P)
    return count
