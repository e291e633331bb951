"""Loops in one pass over rows: what ``quantise.py`` says in torch, and sums."""

from __future__ import annotations

import numpy as np

from tsqp.arith.jit import inline, kernel

LEVELS = np.float32(127.0)  # of 8 bits
_LEAST_SCALE = np.float32(2.0**-126)
_INFINITE_BITS = np.uint32(0x7F800000)
_ABS_BITS = np.uint32(0x7FFFFFFF)
_ROUNDER = np.float32(1.5 * 2**23)  # adding it leaves no fraction: rounds to nearest, ties to even, below 2²²


@inline
def quantise_row(x, levels, values):  # type: ignore[no-untyped-def]
    """One row, float32 (n,), to integers within ±levels, at most 2²¹. Its scale, or what is not finite."""
    bits = x.view(np.uint32)
    largest = np.uint32(0)
    for i in range(bits.shape[0]):
        # Of floats without sign, the order of the bits is the order. (The cast keeps numba in 32 bits.)
        largest = max(largest, np.uint32(bits[i] & _ABS_BITS))
    scale = np.uint32(largest).view(np.float32) / levels
    if scale < _LEAST_SCALE:
        scale = np.float32(1.0)
    if largest >= _INFINITE_BITS:
        values[:] = 0
    else:
        for i in range(x.shape[0]):
            nearest = (x[i] / scale + _ROUNDER) - _ROUNDER
            values[i] = min(max(nearest, -levels), levels)  # that products stay in range rests on this bound
    return scale


@kernel
def quantise(x, values, scales, first, end):  # type: ignore[no-untyped-def]
    """x float32 (rows, n) to values int8 (rows, n) and scales float32 (rows,)."""
    for row in range(first, end):
        scales[row] = quantise_row(x[row], LEVELS, values[row])


@kernel
def row_sums(w, sums, norms, first, end):  # type: ignore[no-untyped-def]
    """w int8 (N, K): the sum of every row, and of its absolute values, int32 (N,)."""
    for row in range(first, end):
        total = np.int32(0)
        norm = np.int32(0)
        for i in range(w.shape[1]):
            value = np.int32(w[row, i])
            total = np.int32(total + value)
            norm = np.int32(norm + abs(value))
        sums[row] = total
        norms[row] = norm
