"""Exact products of 8-bit digits on CUDA."""

from __future__ import annotations

import torch

from tsqp.arith.product import BlockedKernel, DigitKernel


class TensorCoreKernel(DigitKernel):
    """``_int_mm`` on CUDA, which wants more than 16 rows and K, N in multiples of 8."""

    LEAST_ROWS = 32

    def accumulate(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if w.shape[0] % 8 or w.shape[1] % 8:
            return BlockedKernel().accumulate(x, w)
        rows = x.shape[0]
        if rows < self.LEAST_ROWS:
            x = torch.nn.functional.pad(x, (0, 0, 0, self.LEAST_ROWS - rows))
        return torch._int_mm(x, w.t())[:rows]
