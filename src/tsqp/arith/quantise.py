"""Rows of floats as rows of 8-bit integers with one scale each: the one quantiser of weights and activations.

For every row x of float32 numbers, all operations in IEEE float32:

    scale = max|x| / 127            1 where that is below 2⁻¹²⁶, the least normal number: a row of zeros, in effect
    digit = round(x / scale)        to nearest, ties to even; then clamped to [-127, 127]

so that ``x ≈ digit · scale`` within half a scale. Weights are quantised per output channel (a row of W is one), by
this routine on the CPU, whatever device they go to; activations per token. No sum is involved, and a maximum does not
depend on its order: the result is the same, bit for bit, on any number of threads. A row with an infinity or a NaN has
a scale that is not finite, so that its products are not either.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tsqp.arith.loops import quantise
from tsqp.arith.row_threads import row_threads

LEVELS = 127
LEAST_SCALE = torch.finfo(torch.float32).tiny
BLOCK_ELEMENTS = 1 << 19  # of float32 at a time: what is between two steps stays in the cache


class Quantised(NamedTuple):
    """``values`` int8 (rows, n) in [-127, 127], ``scales`` float32 (rows,)."""

    values: torch.Tensor
    scales: torch.Tensor


class Int8Weights(NamedTuple):
    """W[j, i] ≈ wq[j, i] · scales[j] of a linear layer: int8 (N, K) in [-127, 127], and float32 (N,) as its bias."""

    wq: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None


def quantise_rows(x: torch.Tensor) -> Quantised:
    """Quantise x (rows, n), of any float dtype, by the formula above: in one pass on the CPU, in blocks elsewhere."""
    rows, n = x.shape
    values = torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    step = max(1, BLOCK_ELEMENTS // n)
    for first in range(0, rows, step):
        own = slice(first, first + step)
        if x.device.type == "cpu" and rows * n >= BLOCK_ELEMENTS:  # less is not worth compiling a loop for
            wide = x[own].float().contiguous().numpy()
            row_threads().run(quantise, len(wide), wide, values[own].numpy(), scales[own].numpy(), least=2)
        else:
            values[own], scales[own] = quantise_block(x[own])
    return Quantised(values, scales)


def quantise_block(x: torch.Tensor) -> Quantised:
    """The formula as one expression, for a compiler or for few rows."""
    wide = x.float()
    scales = wide.abs().amax(dim=1) / LEVELS
    scales = torch.where(scales < LEAST_SCALE, 1.0, scales)  # written so that a NaN stays one
    values = (wide / scales.unsqueeze(1)).round_().clamp_(-LEVELS, LEVELS)
    return Quantised(values.to(torch.int8), scales)
