"""Loops of few rows of bfloat16 times bfloat16 weights: ``bfloat16_rows.py`` uses them where they can be compiled.

The instruction ``vdpbf16ps`` multiplies 32 pairs of bfloat16 numbers and adds each two products to one of 16 float32
sums; denormal numbers count as zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from tsqp.arith.jit import inline, kernel
from tsqp.arith.row_tile import emitter
from tsqp.model.attention_tiles import FLOATS, HAS_DOT, LANES, add_products
from tsqp.model.compiled import _narrow, _widen

VECTOR = 4 * LANES  # bytes that one instruction takes


def _tile(x_rows: int) -> Any:
    """``x_rows`` rows of x times as many of weights as there are lanes left: see ``row_tile.py``."""
    emit = emitter(x_rows, LANES // x_rows, VECTOR, FLOATS, add_products)

    def typed(_context: Any, x: Any, first_x: Any, w: Any, first_w: Any, sums: Any) -> Any:
        expected = ((x, types.uint8), (w, types.uint8), (sums, types.float32))
        if not HAS_DOT or any(array.layout != "C" or array.dtype != dtype for array, dtype in expected):
            raise TypeError("this loop needs vdpbf16ps, and contiguous arrays of bytes")
        return types.void(x, types.int64, w, types.int64, sums), emit

    return intrinsic(typed)


_one_row, _four_rows = _tile(1), _tile(4)


@kernel
def product_of_one(x, w, bias, out, first, end):  # type: ignore[no-untyped-def]
    """x (1, 2·K) and w (N, 2·K) hold bfloat16 as bytes, bias (N,) or (0,) and out (1, N) as uint16.

    x·wᵀ + bias into columns ``first`` to ``end`` of out, summed in float32 and rounded once.
    """
    sums = np.empty((1, LANES), np.float32)
    for n in range(first, end, LANES):
        _one_row(x, 0, w, n, sums)
        _finish(sums, bias, out, 0, n, end)


@kernel
def product_of_few(x, w, bias, out, first, end):  # type: ignore[no-untyped-def]
    """The same for x (M, 2·K) and out (M, N), four rows at a time."""
    sums = np.empty((4, 4), np.float32)
    for n in range(first, end, 4):
        for m in range(0, x.shape[0], 4):
            _four_rows(x, m, w, n, sums)
            _finish(sums, bias, out, m, n, end)


@inline
def _finish(sums, bias, out, m, n, end):  # type: ignore[no-untyped-def]
    """A tile of sums, as far as it lies within out: with the bias, rounded."""
    for i in range(min(sums.shape[0], out.shape[0] - m)):
        for j in range(min(sums.shape[1], end - n)):
            total = sums[i, j] + (_widen(bias[n + j]) if bias.size else np.float32(0.0))
            out[m + i, n + j] = _narrow(total, out[m + i, n + j])
