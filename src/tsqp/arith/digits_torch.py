"""Numbers mod p and their 8-bit digits in plain torch: for any device, and what ``digits.py`` must equal."""

from __future__ import annotations

import torch

from tsqp.arith.modulus import MAX_CENTRED, P


def split_torch(x: torch.Tensor, digits: int) -> torch.Tensor:
    """The digits of x (T, K), each plus 128: uint8 (digits, T, K)."""
    values = x.long()
    values = torch.where(values > MAX_CENTRED, values - P, values) + 0x80808080
    return torch.stack([(values >> 8 * digit & 255).to(torch.uint8) for digit in range(digits)])


def join_torch(sums: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Sums int32 (digits, T, N) less offsets (N,), weighted by 256ᵐ, mod p: int32 (T, N)."""
    exact = sums - offsets  # in int32, where both may have wrapped around
    total = torch.zeros_like(exact[0], dtype=torch.int64)
    for digit, part in enumerate(exact):
        total += part.long() << 8 * digit
    return (total % P).to(torch.int32)
