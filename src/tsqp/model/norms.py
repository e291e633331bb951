"""Norms, activations and soft caps of the Llama family."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / rms(x) * weight`` over the last dimension (Zhang and Sennrich 2019). Shape and dtype of ``x``.

    The statistics are float32.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).add_(eps))
    return weight * (wide * scale).to(x.dtype)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``rms_norm`` of x less its mean (Ba et al. 2016, without a bias)."""
    wide = x.float()
    wide = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).add_(eps))
    return weight * (wide * scale).to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) · up`` of the two halves of the last dimension: (T, 2·inner) to (T, inner)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``gelu(gate) · up`` of the two halves, gelu by its approximation with tanh (Hendrycks and Gimpel 2016)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)


def relu_squared(up: torch.Tensor) -> torch.Tensor:
    """``max(up, 0)²`` (So et al. 2021), without a gate: (T, inner) to the same."""
    return F.relu(up).square_()


def soft_capped(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    """``cap · tanh(x / cap)``, which is near x where that is small and never beyond the cap; x itself for None."""
    return x if cap is None else x.div(cap).tanh_().mul_(cap)
