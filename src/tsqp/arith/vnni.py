"""Few rows of digits times 8-bit weights, in loops of the instruction ``vpdpbusd``: ``few_rows.py`` uses them.

The instruction multiplies 64 (or 32) unsigned by signed bytes and adds each four products to one of 16 (or 8) sums in
int32. Sums wrap around and never saturate, so they are right modulo 2³² whatever K. Weights are loaded once for four
rows of digits, which one row of numbers mod p is, and what leaves the registers are numbers mod p.

Digits are bytes d + 128, as in ``digits.py``: offsets 128 · (sum of a row of weights) are taken away, modulo 2³² too.
The processor is asked whether it has the instruction only because a process ends at one that is not there: whether
products are exact is for ``self_test.py`` to say.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from tsqp.arith.digits import MULTIPLE, reduced, split
from tsqp.arith.jit import kernel
from tsqp.arith.row_tile import emitter, function


def features() -> set[str]:
    """What the processor can do that loops are compiled for, by LLVM's names."""
    _, _, named = cpu_target.target_context.codegen().magic_tuple()
    return {name[1:] for name in named.split(",") if name.startswith("+")}


def vector_bytes(has: set[str]) -> int:
    """Bytes that one ``vpdpbusd`` takes; 0 where there is none."""
    if has >= {"avx512vnni", "avx512bw"}:
        return 64
    return 32 if "avxvnni" in has or has >= {"avx512vnni", "avx512vl"} else 0


VECTOR = vector_bytes(features())
X_ROWS = 4  # rows of digits at once
W_ROWS = 4 if VECTOR == 64 else 2  # and of weights: with their X_ROWS · W_ROWS sums they fit into the registers

_LANES = ir.VectorType(ir.IntType(32), VECTOR // 4)


def _typed_tile(_context: Any, x: Any, first_x: Any, w: Any, first_w: Any, sums: Any) -> Any:
    """Rows of x uint8 (M, K) from ``first_x`` on times rows of w int8 (N, K) from ``first_w`` on, over whole vectors of
    K: int32 into sums (X_ROWS, W_ROWS). See ``row_tile.py``.
    """
    expected = ((x, types.uint8), (w, types.int8), (sums, types.int32))
    if VECTOR == 0 or any(array.layout != "C" or array.dtype != dtype for array, dtype in expected):
        raise TypeError("this loop needs vpdpbusd, and contiguous arrays of bytes")
    return types.void(x, types.int64, w, types.int64, sums), emitter(X_ROWS, W_ROWS, VECTOR, _LANES, _add_products)


def _add_products(b: ir.IRBuilder, total: Any, digits: Any, weights: Any) -> Any:
    dot = function(b, _LANES, [_LANES] * 3, f"llvm.x86.avx512.vpdpbusd.{VECTOR * 8}")
    return b.call(dot, [total, digits, weights])


_tile: Any = intrinsic(_typed_tile)


@kernel
def _sums(x, first_x, w, first_w, sums):  # type: ignore[no-untyped-def]
    """``_tile`` over all of K: what comes after the last whole vector, term by term."""
    _tile(x, first_x, w, first_w, sums)
    for k in range(x.shape[1] - x.shape[1] % VECTOR, x.shape[1]):
        for i in range(X_ROWS):
            digit = np.int32(x[min(first_x + i, x.shape[0] - 1), k])
            for j in range(W_ROWS):
                sums[i, j] += np.int32(digit * np.int32(w[min(first_w + j, w.shape[0] - 1), k]))


@kernel
def sums_of_few(x, w, out, first, end):  # type: ignore[no-untyped-def]
    """x uint8 (M, K), w int8 (N, K): x·wᵀ modulo 2³² into columns ``first`` to ``end`` of out int32 (M, N)."""
    sums = np.empty((X_ROWS, W_ROWS), np.int32)
    for n in range(first, end, W_ROWS):
        for m in range(0, x.shape[0], X_ROWS):
            _sums(x, m, w, n, sums)
            for i in range(min(X_ROWS, x.shape[0] - m)):
                for j in range(min(W_ROWS, end - n)):
                    out[m + i, n + j] = sums[i, j]


@kernel
def product_of_few(x, w, offsets, out, first, end):  # type: ignore[no-untyped-def]
    """Digits x uint8 (digits · T, K), the lowest first, times w int8 (N, K), less offsets int32 (N,), weighted by 256ᵐ,
    mod p: into columns ``first`` to ``end`` of out uint32 (T, N).
    """
    rows = out.shape[0]
    tiles = np.empty((x.shape[0] // X_ROWS + 1, X_ROWS, W_ROWS), np.int32)
    sums = tiles.reshape(-1, W_ROWS)
    for n in range(first, end, W_ROWS):
        for m in range(0, x.shape[0], X_ROWS):
            _sums(x, m, w, n, tiles[m // X_ROWS])
        for row in range(rows):
            for j in range(min(W_ROWS, end - n)):
                total = MULTIPLE
                for m in range(x.shape[0] // rows):
                    exact = np.int32(sums[m * rows + row, j] - offsets[n + j])  # in int32: both may have wrapped around
                    total += np.int64(exact) << np.int64(8 * m)
                out[row, n + j] = reduced(total)


@kernel
def product_of_numbers(x, digits, w, offsets, out, first, end):  # type: ignore[no-untyped-def]
    """Numbers x (T, K), as ``split`` takes them, times w, as ``product_of_few``. Each thread splits them for itself."""
    own = np.empty((digits, x.shape[0], x.shape[1]), np.uint8)
    split(x, own, 0, x.shape[0])
    product_of_few(own.reshape(digits * x.shape[0], x.shape[1]), w, offsets, out, first, end)
