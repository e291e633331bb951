"""Root-mean-square norm (Zhang and Sennrich 2019) and the activations of the Llama family."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / rms(x) * weight`` over the last dimension; the statistics are float32. Shape and dtype of ``x``."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).add_(eps))
    return weight * (wide * scale).to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) · up`` of the two halves of the last dimension: (T, 2·inner) to (T, inner)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def relu_squared(up: torch.Tensor) -> torch.Tensor:
    """``max(up, 0)²`` (So et al. 2021), without a gate: (T, inner) to the same."""
    return F.relu(up).square_()
