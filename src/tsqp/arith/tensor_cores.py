"""Exact products of 8-bit digits, and mod p, on CUDA."""

from __future__ import annotations

import torch

from tsqp.arith.digits_torch import join_torch, split_torch
from tsqp.arith.field import Digits, FieldWeights
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


class DeviceFieldKernel(TensorCoreKernel):
    """A kernel that makes a whole product mod p of numbers, without digits or sums between."""

    def field_product(self, x: torch.Tensor, w: torch.Tensor, digits: Digits, out: torch.Tensor) -> None:
        """``out = x·wᵀ mod p`` as in ``FieldWeights.product``: rows of x and ``out`` lie closely, and so does w."""
        raise NotImplementedError


class DeviceFieldWeights(FieldWeights):
    """The same product with everything on one device: x, ``wq``, the result, and what is between them."""

    def product(self, x: torch.Tensor, digits: Digits, *, out: torch.Tensor) -> None:
        if isinstance(self.kernel, DeviceFieldKernel):
            return self.kernel.field_product(x, self.wq, digits, out)
        return super().product(x, digits, out=out)

    def _split(self, x: torch.Tensor, digits: Digits) -> torch.Tensor:
        return split_torch(x, digits)

    def _join(self, sums: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor) -> None:
        out.view(torch.int32).copy_(join_torch(sums, offsets))
