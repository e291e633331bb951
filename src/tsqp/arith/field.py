"""Exact products mod p of uniform numbers and 8-bit weights: ``docs/masking.md`` §1 and §2.

``x·Wqᵀ`` is computed as one product of 8-bit digits: x is split into balanced base-256 digits, each digit matrix is
multiplied by Wq exactly, and the sums are put together again mod p.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from tsqp.arith.bits import bits
from tsqp.arith.digits import join, split
from tsqp.arith.large_memory import large_memory
from tsqp.arith.product import DigitKernel
from tsqp.arith.row_threads import least_rows, row_threads

MAX_SMALL = 127 * 256 + 127  # the largest number of two balanced digits
MAX_FIELD_TERMS = 132_104  # 128 · 127 · 132,104 < 2³¹: no sum of products of digits leaves int32

Digits = Literal[2, 4]
Array = np.ndarray[Any, np.dtype[Any]]

_SUMS = 1 << 22  # int32 at a time: what is between the two steps stays in the cache
_LEAST_COLUMNS = 1024


@dataclass(frozen=True)
class FieldWeights:
    """One matrix to multiply by: ``wq`` int8 (N, K) on the CPU, K ≤ ``MAX_FIELD_TERMS``; its kernel's offsets (N,)."""

    wq: torch.Tensor
    offsets: torch.Tensor
    kernel: DigitKernel

    @classmethod
    def of(cls, wq: torch.Tensor, kernel: DigitKernel) -> FieldWeights:
        if wq.shape[1] > MAX_FIELD_TERMS:
            raise ValueError(f"sums of {wq.shape[1]} terms do not fit into 32 bits; the limit is {MAX_FIELD_TERMS}")
        return cls(wq, kernel.offsets(wq), kernel)

    def product(self, x: torch.Tensor, digits: Digits, *, out: torch.Tensor) -> None:
        """``out = x·wqᵀ mod p``, (T, N), the bits of uint32 in an int32 tensor.

        4 digits: x (T, K) is like ``out``. 2 digits: x is int16, of at most ``MAX_SMALL``.
        """
        digits_of_x = self._split(x, digits)
        if self.kernel.at_once(digits * len(x)):
            return self.kernel.product_mod_p(digits_of_x, self.wq, self.offsets, out)
        columns = max(_LEAST_COLUMNS, _SUMS // (digits * len(x)))
        for own in (slice(first, first + columns) for first in range(0, len(self.wq), columns)):
            sums = self.kernel.accumulate_unsigned(digits_of_x.flatten(0, 1), self.wq[own]).view(digits, len(x), -1)
            self._join(sums, self.offsets[own], out[:, own].view(torch.uint32))
        return None

    def _split(self, x: torch.Tensor, digits: Digits) -> torch.Tensor:
        """Every digit of x, plus 128: uint8 (digits, T, K)."""
        out = torch.from_numpy(large_memory().array((digits, *x.shape), np.uint8))
        values = x.view(torch.uint32 if digits == 4 else torch.int16)
        row_threads().run(split, len(x), bits(values), bits(out), least=least_rows(x.shape[1]))
        return out

    def _join(self, sums: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor) -> None:
        """Sums of digits, int32 (digits, T, N), with their kernel's offsets (N,), mod p into out, uint32 (T, N)."""
        row_threads().run(join, len(out), bits(sums), bits(offsets), bits(out), least=least_rows(out.shape[1]))
