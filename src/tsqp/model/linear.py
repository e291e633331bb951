"""Linear groups with weights: loaded and multiplied the same way on whichever side holds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F

from tsqp.checkpoint.base import Checkpoint
from tsqp.config.groups import GroupKey, LinearGroup, group_keys, linear_groups, part_tensor
from tsqp.model import bfloat16_rows
from tsqp.progress import Progress, counted, unseen


class LinearProduct(Protocol):
    """One linear group that can be multiplied by, whatever its weights are kept as."""

    @property
    def group(self) -> LinearGroup: ...

    def input(self, rows: int) -> torch.Tensor:
        """Uninitialised memory for an input of this group: (rows, in_features)."""

    def product(self, x: torch.Tensor, part: int | None = None, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """``x Wᵀ + b`` for x (T, in_features): all parts, or one; written to ``out`` if given."""


@dataclass(frozen=True)
class LinearWeights:
    """``weight`` (out_features, in_features) with the parts concatenated, ``bias`` (out_features,) or None.

    ``loops``: whether compiled loops multiply few rows.
    """

    group: LinearGroup
    weight: torch.Tensor
    bias: torch.Tensor | None
    loops: bool

    def input(self, rows: int) -> torch.Tensor:
        """Uninitialised memory for an input of this group: (rows, in_features), of the weight's dtype."""
        return self.weight.new_empty(rows, self.group.in_features)

    def product(self, x: torch.Tensor, part: int | None = None, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """``x Wᵀ + b`` for x (T, in_features) of the weight's dtype: all parts, or one; written to ``out`` if given."""
        first, end = self.group.part_rows(part)
        weight = self.weight[first:end]
        bias = None if self.bias is None else self.bias[first:end]
        if self.loops and bfloat16_rows.serves(x, out):
            return bfloat16_rows.product(x, weight, bias, out)
        if out is None:
            return F.linear(x, weight, bias)
        return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


def prepared(linear: LinearProduct, x: torch.Tensor, part: int | None, out: torch.Tensor) -> Callable[[], object]:
    """``linear.product`` of memory that stays: of whatever x holds when it is called."""
    if not isinstance(linear, LinearWeights):
        return partial(linear.product, x, part, out=out)
    first, end = linear.group.part_rows(part)
    weight, bias = linear.weight[first:end], None if linear.bias is None else linear.bias[first:end]
    if linear.loops and bfloat16_rows.serves(x, out):
        return bfloat16_rows.prepared(x, weight, bias, out)
    if bias is None:
        return partial(torch.mm, x, weight.T, out=out)
    return partial(torch.addmm, bias, x, weight.T, out=out)


def load_groups(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: Progress = unseen,
) -> dict[GroupKey, LinearWeights]:
    """Read every group of a checkpoint. Raises CorruptCheckpoint."""
    keys = counted(group_keys(checkpoint.config), "reading the weights", progress)
    return {key: load_group(checkpoint, key, dtype, device) for key in keys}


def load_group(
    checkpoint: Checkpoint, key: GroupKey, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> LinearWeights:
    """Read one group from a checkpoint. Raises CorruptCheckpoint when a matrix is missing or misshapen."""
    weight, bias = read_group(checkpoint, key, dtype, device)
    loops = bfloat16_rows.has_loops(weight)
    if loops:
        bfloat16_rows.compile_loops()
    return LinearWeights(linear_groups(checkpoint.config)[key[0]], weight, bias, loops)


def read_group(
    checkpoint: Checkpoint, key: GroupKey, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of one group, as ``LinearWeights`` has them. Raises CorruptCheckpoint."""
    name, layer = key
    group = linear_groups(checkpoint.config)[name]
    weight = _concatenated(checkpoint, group, layer, "weight", dtype, device)
    bias = _concatenated(checkpoint, group, layer, "bias", dtype, device) if group.bias else None
    return weight, bias


def _concatenated(
    checkpoint: Checkpoint,
    group: LinearGroup,
    layer: int | None,
    kind: str,
    dtype: torch.dtype,
    device: torch.device | str,
) -> torch.Tensor:
    shape = (group.out_features, group.in_features) if kind == "weight" else (group.out_features,)
    whole = torch.empty(shape, dtype=dtype, device=device)
    for index, (part, _) in enumerate(group.parts):
        start, _ = group.part_rows(index)
        for first, rows in checkpoint.row_blocks(part_tensor(layer, part, kind)):
            whole[start + first : start + first + len(rows)] = rows
    return whole
