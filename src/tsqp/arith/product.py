"""Exact products of 8-bit digits, accumulated in int32.

``torch._int_mm`` is exact on processors with VNNI or AMX and on tensor cores. Elsewhere it may add pairs of products in
saturating 16-bit arithmetic, so that nearly every output is wrong: a self-test with random digits decides (digits that
are all extreme would pass it). Where it fails, ``BlockedKernel`` multiplies in float32, in blocks of so few terms that
every partial sum is an integer below 2²⁴, which float32 holds exactly.
"""

from __future__ import annotations

import torch

from tsqp.arith.digits_torch import join_torch
from tsqp.arith.loops import row_sums
from tsqp.arith.row_threads import row_threads

MAX_INT8_TERMS = 66_311  # 255 · 127 · 66,311 < 2³¹: no sum of so many terms leaves int32, offset digits included
BLOCK_TERMS = 1_024  # 128 · 127 · 1,024 < 2²⁴
BLOCK_COLUMNS = 4_096  # bounds the float32 copy of a block of weights to 16 MB


class DigitKernel:
    """Products of digits x int8 (T, K) and w int8 (N, K), K ≤ ``MAX_INT8_TERMS``.

    ``accumulate(x, w) - offsets(w)`` is x·wᵀ, exactly: int32 (T, N). The offsets depend on w alone. Sums may
    wrap around: the difference is right modulo 2³² for any K.
    """

    def at_once(self, rows: int) -> bool:
        """Whether ``product_mod_p`` is faster than its steps one by one, for so many rows of digits in all."""
        return False

    def offsets(self, w: torch.Tensor) -> torch.Tensor:
        """int32 (N,), to be computed once for weights that stay."""
        return w.new_zeros(w.shape[0], dtype=torch.int32)

    def accumulate(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """int32 (T, N)."""
        raise NotImplementedError

    def accumulate_unsigned(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """The same for digits that come as x + 128, uint8 (T, K)."""
        return self.accumulate((x ^ 128).view(torch.int8), w)  # flipping the top bit takes 128 away

    def product_mod_p(self, x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor) -> None:
        """Digits + 128 of numbers, uint8 (digits, T, K), the lowest first, times w, into out, int32 (T, N) mod p.

        K ≤ ``field.MAX_FIELD_TERMS``; ``offsets`` are ``offsets(w)``. Here from its steps, as others may do it in one.
        """
        out.copy_(join_torch(self.accumulate_unsigned(x.flatten(0, 1), w).view(len(x), *out.shape), offsets))


class OffsetKernel(DigitKernel):
    """``_int_mm`` on the CPU: the instruction multiplies unsigned by signed bytes, so x goes in as x + 128."""

    def offsets(self, w: torch.Tensor) -> torch.Tensor:
        sums = torch.empty(2, len(w), dtype=torch.int32)
        row_threads().run(row_sums, len(w), w.numpy(), *sums.numpy(), least=2)
        return sums[0] * 128

    def accumulate(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return self.accumulate_unsigned(x.view(torch.uint8) ^ 128, w)

    def accumulate_unsigned(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if x.shape[1] == 1:  # the one inner size that torch 2.13 multiplies wrongly: it mistakes w.t()'s strides
            return x.int() * w.int().t()
        return torch._int_mm(x, w.t())


class BlockedKernel(DigitKernel):
    """Float32 products over blocks of terms: exact everywhere, and slow."""

    def accumulate(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(x.shape[0], w.shape[0], dtype=torch.int32, device=x.device)
        for k in range(0, x.shape[1], BLOCK_TERMS):
            terms = x[:, k : k + BLOCK_TERMS].float()
            for n in range(0, w.shape[0], BLOCK_COLUMNS):
                partial = terms @ w[n : n + BLOCK_COLUMNS, k : k + BLOCK_TERMS].float().t()
                total[:, n : n + BLOCK_COLUMNS] += partial.to(torch.int32)
        return total
