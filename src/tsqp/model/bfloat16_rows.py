"""Few rows of bfloat16 times bfloat16 weights, as fast as memory gives the weights: what a decode step asks for.

The library's product of one row reads weights at a fraction of that rate on processors without AMX, and wakes a thread
for each core however small the product. ``torch.nn.functional.linear`` says the same plainly, and is what many rows and
processors without ``vdpbf16ps`` have.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from tsqp.arith.bits import bits
from tsqp.arith.row_threads import RowWork
from tsqp.arith.vnni import features
from tsqp.model.attention_tiles import HAS_DOT, LANES
from tsqp.model.compiled_rows import VECTOR, product_of_few, product_of_one

FEW = 4 if "amx-bf16" in features() else 24  # rows up to which the loops are faster: docs/performance.md
LEAST_BYTES = 2 << 20  # of weights, times four rows, from which on a second thread is worth waking


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


def prepared(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> RowWork:
    """The same of memory that stays: of whatever x holds when it is called."""
    added = np.empty(0, np.uint16) if bias is None else bits(bias)
    arrays = (x.view(torch.uint8).numpy(), weight.view(torch.uint8).numpy(), added, bits(out))
    loop = product_of_one if len(x) == 1 else product_of_few
    least = max(2, LEAST_BYTES // (arrays[1].shape[1] * max(1, len(x) // 4)))
    return RowWork(loop, len(weight), arrays, least)


@cache
def compile_loops() -> None:
    """Multiply once, so that no call waits for the compiler."""
    weight = torch.zeros(LANES, VECTOR // 2, dtype=torch.bfloat16)
    for rows in (1, 2):
        product(weight[:rows], weight, None, torch.empty(rows, LANES, dtype=torch.bfloat16))
