"""Groups of few numbers, what their products must be, and what is left of pads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tests.trusted.guard.honest import HonestConnection
from tsqp.api.config import ProtectionName
from tsqp.arith.modulus import P
from tsqp.arith.product import BlockedKernel
from tsqp.arith.quantise import Int8Weights
from tsqp.config.groups import GroupKey
from tsqp.trusted.guard.linears import CheckedLinears, MaskedLinears, VerifiedLinears
from tsqp.trusted.guard.pads import PadBlock
from tsqp.trusted.guard.pool import PadPool
from tsqp.trusted.guard.sources import LocalPadSource, PadSource
from tsqp.trusted.guard.weights import GuardedGroup

Array = np.ndarray[Any, np.dtype[Any]]
Groups = dict[GroupKey, GuardedGroup]
Weights = Mapping[GroupKey, torch.Tensor]  # Wq, int8 (N, K)

KEY: GroupKey = ("qkv", 0)
OTHER: GroupKey = ("qkv", 1)
HEAD: GroupKey = ("lm_head", None)
SHAPES: dict[GroupKey, tuple[int, int]] = {KEY: (24, 40), OTHER: (24, 40), HEAD: (50, 40)}

MODES: tuple[ProtectionName, ...] = ("verified", "masked")


def make_groups(
    shapes: Mapping[GroupKey, tuple[int, int]] = SHAPES,
    *,
    seed: int = 0,
    checks: int = 2,
    slices: Mapping[GroupKey, Sequence[int]] | None = None,
) -> tuple[Groups, Weights]:
    """Groups with random weights, scales and biases; and their Wq. ``slices``: as of ``GuardedGroup.of``."""
    generator = torch.Generator().manual_seed(seed)
    groups, weights = {}, {}
    for key, (n, k) in shapes.items():
        weights[key] = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
        scales, bias = torch.rand(2, n, generator=generator)
        ends = () if slices is None else slices[key]
        groups[key] = GuardedGroup.of(
            key, Int8Weights(weights[key], scales, bias), BlockedKernel(), checks=checks, slices=ends
        )
    return groups, weights


def make_pool(groups: Groups, source: PadSource | None = None, *, wait: bool = True) -> PadPool:
    return PadPool(groups, source or LocalPadSource(), wait=wait)


def make_linears(mode: str, line: HonestConnection, groups: Groups) -> CheckedLinears:
    return VerifiedLinears(line, groups) if mode == "verified" else MaskedLinears(line, groups, make_pool(groups))


def expected_product(group: GuardedGroup, wq: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The product by the formulas of docs/masking.md §1, in float32 and int64."""
    limit = np.float32(group.limit)
    scale = np.abs(x.numpy()).max(axis=1, keepdims=True) / limit
    scale = np.where(scale < np.float32(2.0**-126), np.float32(1), scale)
    xq = np.clip(np.round(x.numpy() / scale), -limit, limit).astype(np.int64)
    y = (xq @ wq.numpy().astype(np.int64).T).astype(np.float32)
    return torch.from_numpy((y * scale) * group.scales + group.bias)


def record_blocks(monkeypatch: Any) -> list[PadBlock]:
    """Every block of pads that is made from now on."""
    blocks: list[PadBlock] = []

    class Recorded(PadBlock):
        def __init__(self, key: bytearray) -> None:
            super().__init__(key)
            blocks.append(self)

    monkeypatch.setattr("tsqp.trusted.guard.pool.PadBlock", Recorded)
    return blocks


def secrets_of(blocks: Sequence[PadBlock]) -> list[str]:
    """What is left of blocks that should be destroyed: nothing, hopefully."""
    left = []
    for number, block in enumerate(blocks):
        if any(block._key):
            left.append(f"the key of block {number}")
        for name, rows in (("pads", block._pads), ("products", block._products)):
            if rows is not None and (rows < P).any():
                left.append(f"{name} of block {number}")
    return left
