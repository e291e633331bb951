"""Linear groups with weights: loaded and multiplied the same way on whichever side holds them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tsqp.checkpoint.base import Checkpoint
from tsqp.spec.groups import LAYER_GROUPS, GroupName, LinearGroup, linear_groups, part_tensor
from tsqp.spec.model import ModelSpec

GroupKey = tuple[GroupName, int | None]  # the LM head has layer None


def group_keys(spec: ModelSpec) -> list[GroupKey]:
    """Every linear group of a model, layer by layer, the LM head last."""
    keys: list[GroupKey] = [(name, layer) for layer in range(spec.num_layers) for name in LAYER_GROUPS]
    return [*keys, ("lm_head", None)]


@dataclass(frozen=True)
class LinearWeights:
    """``weight`` (out_features, in_features) with the parts concatenated, ``bias`` (out_features,) or None."""

    group: LinearGroup
    weight: torch.Tensor
    bias: torch.Tensor | None

    def product(self, x: torch.Tensor, part: int | None = None) -> torch.Tensor:
        """``x Wᵀ + b`` for x (T, in_features) of the weight's dtype: all parts, or one."""
        first, end = self.group.part_rows(part)
        bias = None if self.bias is None else self.bias[first:end]
        return F.linear(x, self.weight[first:end], bias)


def load_group(
    checkpoint: Checkpoint, key: GroupKey, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> LinearWeights:
    """Read one group from a checkpoint. Raises CorruptCheckpoint when a matrix is missing or misshapen."""
    name, layer = key
    group = linear_groups(checkpoint.spec)[name]
    weight = _concatenated(checkpoint, group, layer, "weight", dtype, device)
    bias = _concatenated(checkpoint, group, layer, "bias", dtype, device) if group.bias else None
    return LinearWeights(group, weight, bias)


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
        first, end = group.part_rows(index)
        whole[first:end] = checkpoint.tensor(part_tensor(layer, part, kind))
    return whole
