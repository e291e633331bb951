"""Rotary position embedding (Su et al. 2021) in the half-rotation layout of transformers."""

from __future__ import annotations

import math

import torch

from tsqp.config.model import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Angles per position, float32 (head_dim / 2,), with the scaling of ``rope`` applied."""
    base = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        return _llama3(base, rope)
    return base


def _llama3(base: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Llama 3.1: wavelengths past the old context are stretched by ``factor``, short ones kept, a ramp between."""
    wavelength = 2 * math.pi / base
    longest = rope.original_max_positions / rope.low_freq_factor
    shortest = rope.original_max_positions / rope.high_freq_factor
    ramp = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - ramp) * base / rope.factor + ramp * base
    kept_or_blended = torch.where(wavelength < shortest, base, blended)
    return torch.where(wavelength > longest, base / rope.factor, kept_or_blended)


class Rotary:
    """Cosine and sine tables for every position of the context, in the compute dtype."""

    def __init__(self, rope: RopeConfig, head_dim: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self._inverse = inverse_frequencies(rope, head_dim).to(device)
        self._dtype = dtype

    def tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine for int64 positions (T,): (T, head_dim) each."""
        angles = torch.outer(positions.to(self._inverse), self._inverse)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(self._dtype), angles.sin().to(self._dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate ``x`` (T, heads, head_dim) by the tables of its positions, (T, head_dim) each."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)
