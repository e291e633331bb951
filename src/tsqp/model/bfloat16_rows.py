"""Few rows of bfloat16 times bfloat16 weights, as fast as memory gives the weights: what a decode step asks for.

The library's product of one row reads weights at a fraction of that rate on processors without AMX, and wakes a thread
for each core however small the product. The instruction ``vdpbf16ps`` multiplies 32 pairs of bfloat16 numbers and adds
each two products to one of 16 float32 sums; denormal numbers count as zero. ``torch.nn.functional.linear`` says the
same plainly, and is what many rows and other processors have.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import intrinsic

from tsqp.arith.bits import bits
from tsqp.arith.jit import inline, kernel
from tsqp.arith.row_threads import row_threads
from tsqp.arith.row_tile import emitter
from tsqp.arith.vnni import features
from tsqp.model.attention_tiles import FLOATS, HAS_DOT, LANES, add_products
from tsqp.model.compiled import _narrow, _widen

VECTOR = 4 * LANES  # bytes that one instruction takes
FEW = 4 if "amx-bf16" in features() else 8  # rows up to which the loops are faster: docs/performance.md
LEAST_BYTES = 2 << 20  # of weights, from which on a second thread is worth waking: one reads less in the time it takes


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


def has_loops(weight: torch.Tensor) -> bool:
    """Whether there are loops for these weights: rows of whole vectors, on a processor that has the instruction."""
    here = HAS_DOT and weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return here and weight.shape[1] % (VECTOR // 2) == 0 and weight.is_contiguous()


def serves(x: torch.Tensor, out: torch.Tensor | None) -> bool:
    """Whether the loops multiply this input by such weights."""
    return 0 < len(x) <= FEW and all(one is None or _plain(one) for one in (x, out))


def _plain(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and tensor.is_contiguous()


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x (M, K) times weight (N, K) plus bias (N,), bfloat16, into out (M, N): for what ``has_loops`` and ``serves``."""
    out = x.new_empty(len(x), len(weight)) if out is None else out
    prepared(x, weight, bias, out)()
    return out


def prepared(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> Callable[[], None]:
    """The same of memory that stays: of whatever x holds when it is called."""
    arrays = (x.view(torch.uint8).numpy(), weight.view(torch.uint8).numpy())
    added = np.empty(0, np.uint16) if bias is None else bits(bias)
    loop = product_of_one if len(x) == 1 else product_of_few
    least = max(2, LEAST_BYTES // arrays[1].shape[1])
    return partial(row_threads().run, loop, len(weight), *arrays, added, bits(out), least=least)


@cache
def compile_loops() -> None:
    """Multiply once, so that no call waits for the compiler."""
    weight = torch.zeros(LANES, VECTOR // 2, dtype=torch.bfloat16)
    for rows in (1, 2):
        product(weight[:rows], weight, None, torch.empty(rows, LANES, dtype=torch.bfloat16))
