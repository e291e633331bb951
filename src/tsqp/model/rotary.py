"""Rotary position embedding (Su et al. 2021) in the half-rotation layout of transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tsqp.config.model import ModelConfig, RopeConfig
from tsqp.model import vector_math


def inverse_frequencies(rope: RopeConfig, head_dim: int, length: int = 0) -> torch.Tensor:
    """Angles per position, float32 (head_dim / 2,), for a text of ``length``; 0 for pairs that are not rotated."""
    width = rope.rotary_dim or head_dim
    turned = torch.zeros(head_dim // 2)
    if rope.kind != "none":
        turned[: width // 2] = _scaled(rope, width, length)
    return turned


def _scaled(rope: RopeConfig, width: int, length: int) -> torch.Tensor:
    """Those of the pairs of ``width`` numbers, with the scaling of ``rope`` applied."""
    theta = _grown_theta(rope, width, length) if rope.kind == "dynamic" else rope.theta
    base = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width)
    match rope.kind:
        case "linear":
            return base / rope.factor
        case "llama3":
            return _llama3(base, rope)
        case "yarn":
            return _yarn(base, rope, width)
        case "longrope":
            long = length > rope.original_max_positions
            return base / torch.tensor(rope.long_factors if long else rope.short_factors)
    return base


def _grown_theta(rope: RopeConfig, width: int, length: int) -> float:
    """Dynamic NTK: the base for a text of ``length``, that of the model up to its original context."""
    turns = max(length, rope.original_max_positions) / rope.original_max_positions
    return float(rope.theta * (rope.factor * turns - (rope.factor - 1)) ** (width / (width - 2)))


def _yarn(base: torch.Tensor, rope: RopeConfig, width: int) -> torch.Tensor:
    """YaRN (Peng et al. 2023, section 3.2): a ramp over pairs, from those that are kept to those that are stretched."""

    def pair(turns: float) -> float:
        """The pair that turns so often within the original context."""
        return width * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    ramp = torch.arange(width // 2, dtype=torch.float32) - first
    stretched = (ramp / (last - first if last != first else 0.001)).clamp(0, 1)
    return base / rope.factor * stretched + base * (1 - stretched)


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
    """Cosine and sine tables of every rotary embedding that a model's layers have, in the compute dtype.

    ``tables`` does all of it. ``following`` and ``of`` are its two halves, for who computes the second one on a device
    that nothing may wait for.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        vector_math.settle()
        self._ropes, self._head_dim = config.ropes, config.head_dim
        self._fixed = [
            None if rope.follows_length else inverse_frequencies(rope, config.head_dim).to(device)
            for rope in config.ropes
        ]
        self._factors = [
            None if rope.attention_factor == 1.0 else self._of_turned(rope).to(device) for rope in config.ropes
        ]
        self._dtype = dtype
        self._device = device

    def tables(self, positions: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine for int64 positions (T,) of texts of ``lengths`` (T,): (ropes, T, head_dim) each."""
        following = self.following(lengths)
        return self.of(positions.to(self._device), [angles.to(self._device) for angles in following])

    def following(self, lengths: torch.Tensor) -> list[torch.Tensor]:
        """Angles per position, float32 (T, head_dim / 2) on the CPU, for each embedding that follows the length."""
        return [self._of_lengths(rope, lengths) for rope in self._ropes if rope.follows_length]

    def of(self, positions: torch.Tensor, following: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The tables of positions (T,) and of what ``following`` gives, both on the device, where all is computed."""
        left = iter(following)
        pairs = []
        for inverse, factors in zip(self._fixed, self._factors, strict=True):
            angles = positions.float().unsqueeze(1) * (next(left) if inverse is None else inverse)
            angles = torch.cat((angles, angles), dim=-1)
            cos, sin = angles.cos(), angles.sin()
            if factors is not None:
                cos, sin = cos * factors, sin * factors
            pairs.append((cos.to(self._dtype), sin.to(self._dtype)))
        cos, sin = (torch.stack(tables) for tables in zip(*pairs, strict=True))
        return cos, sin

    def _of_lengths(self, rope: RopeConfig, lengths: torch.Tensor) -> torch.Tensor:
        kinds, which = torch.tensor([rope.table_length(length) for length in lengths.tolist()]).unique(
            return_inverse=True
        )
        inverse = torch.stack([inverse_frequencies(rope, self._head_dim, kind) for kind in kinds.tolist()])
        return inverse[which]

    def _of_turned(self, rope: RopeConfig) -> torch.Tensor:
        """What multiplies each number of a head, float32 (head_dim,): the factor for those that are rotated."""
        half = torch.arange(self._head_dim // 2) < (rope.rotary_dim or self._head_dim) // 2
        return torch.where(torch.cat((half, half)), rope.attention_factor, 1.0)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate ``x`` (T, heads, head_dim) by the tables of its positions, (T, head_dim) each."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)
