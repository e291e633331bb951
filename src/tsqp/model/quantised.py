"""Linear groups as 8-bit weights, read the same way on whichever side needs them, and digests that compare them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from tsqp.arith.field import MAX_FIELD_TERMS
from tsqp.arith.quantise import quantise_rows
from tsqp.checkpoint.base import Checkpoint
from tsqp.config.groups import GroupKey, GroupName, LinearGroup, linear_groups, part_tensor
from tsqp.errors import UnsupportedModel


@dataclass(frozen=True)
class QuantisedGroup:
    """One linear group on the CPU: W[j, i] ≈ wq[j, i] · scales[j], all parts concatenated, all numbers finite.

    ``wq`` int8 (out_features, in_features) in [-127, 127], ``scales`` and ``bias`` float32 (out_features,).
    """

    group: LinearGroup
    wq: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None


def load_quantised_group(checkpoint: Checkpoint, key: GroupKey) -> QuantisedGroup:
    """Read one group and quantise it per output channel, on the CPU.

    Raises CorruptCheckpoint; UnsupportedModel for weights that are not finite, or sums that int32 cannot hold.
    """
    name, layer = key
    group = linear_groups(checkpoint.config)[name]
    if group.in_features > MAX_FIELD_TERMS:
        raise UnsupportedModel(
            f"{group_label(key)} has {group.in_features} inputs, 8-bit products at most {MAX_FIELD_TERMS}: "
            "use protection open in a float dtype",
            fields=("protection",),
        )
    wq = torch.empty(group.out_features, group.in_features, dtype=torch.int8)
    scales = torch.empty(group.out_features, dtype=torch.float32)
    bias = torch.empty(group.out_features, dtype=torch.float32) if group.bias else None
    for index, (part, _) in enumerate(group.parts):
        first, end = group.part_rows(index)
        wq[first:end], scales[first:end] = quantise_rows(checkpoint.tensor(part_tensor(layer, part, "weight")))
        if bias is not None:
            bias[first:end] = checkpoint.tensor(part_tensor(layer, part, "bias"))
    # A weight that is not finite gives its row a scale that is not, so that the weights need no second pass.
    if not all(bool(values.isfinite().all()) for values in (scales, bias) if values is not None):
        raise UnsupportedModel(f"{group_label(key)} has weights that are not finite numbers: use another checkpoint")
    return QuantisedGroup(group, wq, scales, bias)


def group_label(key: GroupKey) -> str:
    """``group qkv of layer 3``, for a person."""
    name, layer = key
    return f"group {name}" if layer is None else f"group {name} of layer {layer}"


class GroupDigests:
    """SHA-256 for each group name over its 8-bit weights: all layers in order, each row-major."""

    def __init__(self) -> None:
        self._hashes: dict[GroupName, hashlib._Hash] = {}
        self._next: dict[GroupName, int] = {}

    def add(self, key: GroupKey, wq: torch.Tensor) -> None:
        """Take one layer's ``wq``, int8 and contiguous on the CPU. Raises ValueError for a layer out of order."""
        name, layer = key
        expected = self._next.get(name, 0)
        if (layer or 0) != expected:
            raise ValueError(f"{group_label(key)} is added where layer {expected} was expected")
        self._next[name] = expected + 1
        self._hashes.setdefault(name, hashlib.sha256()).update(wq.numpy().data)

    def hexdigests(self) -> dict[GroupName, str]:
        """64 hex digits for each group that was added."""
        return {name: digest.hexdigest() for name, digest in self._hashes.items()}
