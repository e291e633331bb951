"""Exact products mod p of uniform numbers and 8-bit weights: ``docs/masking.md`` §1 and §2.

``x·Wqᵀ`` is computed as one product of 8-bit digits: x is split into balanced base-256 digits, each digit matrix is
multiplied by Wq exactly, and the sums are put together again, mod p where they need it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from tsqp.arith.digits import join_field, join_small, split_field, split_small
from tsqp.arith.product import DigitKernel
from tsqp.arith.rows import row_threads

P = 2**31 - 1
MAX_CENTRED = (P - 1) // 2
MAX_SMALL = 127 * 256 + 127  # the largest number of two balanced digits
MAX_INNER = 132_104  # 128 · 127 · 132,104 < 2³¹: no sum of products of digits leaves int32

Digits = Literal[2, 4]

_SUMS = 1 << 22  # int32 at a time: what is between the two steps stays in the cache
_LEAST_COLUMNS = 1024


@dataclass(frozen=True)
class FieldWeights:
    """One matrix to multiply by: ``wq`` int8 (N, K) on any device, K ≤ ``MAX_INNER``, and its kernel's offsets (N,)."""

    wq: torch.Tensor
    offsets: torch.Tensor
    kernel: DigitKernel

    @classmethod
    def of(cls, wq: torch.Tensor, kernel: DigitKernel) -> FieldWeights:
        if wq.shape[1] > MAX_INNER:
            raise ValueError(f"sums of {wq.shape[1]} terms do not fit into 32 bits; the limit is {MAX_INNER}")
        return cls(wq, kernel.offsets(wq), kernel)

    def product(self, x: torch.Tensor, digits: Digits, *, out: torch.Tensor) -> None:
        """``out = x·wqᵀ``.

        4 digits: x (T, K) canonical and out (T, N) canonical, the bits of uint32 in int32 tensors. 2 digits: x int16
        of at most ``MAX_SMALL``, out int32; exact when the product fits, otherwise mod 2³².
        """
        columns = max(_LEAST_COLUMNS, _SUMS // (digits * len(x)))
        split = _split_compiled(x, digits) if x.device.type == "cpu" else split_torch(x, digits)
        for first in range(0, len(self.wq), columns):
            own = slice(first, first + columns)
            sums = self.kernel.accumulate_unsigned(split.flatten(0, 1), self.wq[own]).view(digits, len(x), -1)
            if x.device.type == "cpu":
                _join_compiled(sums, self.offsets[own], digits, out[:, own])
            else:
                out[:, own] = join_torch(sums, self.offsets[own], digits)


def _split_compiled(x: torch.Tensor, digits: Digits) -> torch.Tensor:
    split = torch.empty(digits, *x.shape, dtype=torch.uint8)
    work, view = (split_field, torch.uint32) if digits == 4 else (split_small, torch.int16)
    row_threads().run(work, len(x), x.view(view).numpy(), split.numpy(), least=_least_rows(x))
    return split


def _join_compiled(sums: torch.Tensor, offsets: torch.Tensor, digits: Digits, out: torch.Tensor) -> None:
    work, view = (join_field, torch.uint32) if digits == 4 else (join_small, torch.int32)
    arrays = (sums.numpy(), offsets.numpy(), out.view(view).numpy())
    row_threads().run(work, len(out), *arrays, least=_least_rows(out))


def _least_rows(x: torch.Tensor) -> int:
    """Rows from which on a pass over ``x`` is worth a second thread."""
    return max(2, (1 << 17) // x.shape[1])


def split_torch(x: torch.Tensor, digits: Digits) -> torch.Tensor:
    """The digits of ``x``, each plus 128: uint8 (digits, T, K). For any device, and what the compiled loop equals."""
    values = x.long()
    if digits == 4:
        values = torch.where(values > MAX_CENTRED, values - P, values)
    values = values + 0x80808080
    return torch.stack([(values >> 8 * digit & 255).to(torch.uint8) for digit in range(digits)])


def join_torch(sums: torch.Tensor, offsets: torch.Tensor, digits: Digits) -> torch.Tensor:
    """Sums (digits, T, N) as one number each, int32 (T, N): canonical mod p for four digits."""
    exact = sums - offsets  # in int32, where both may have wrapped around
    total = sum(exact[digit].long() << 8 * digit for digit in range(digits))
    return (total % P if digits == 4 else total).to(torch.int32)  # type: ignore[union-attr]
