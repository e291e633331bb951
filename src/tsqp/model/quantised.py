"""Linear groups as 8-bit weights, read the same way on whichever side needs them, and digests that compare them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

from tsqp.arith.field import MAX_FIELD_TERMS
from tsqp.arith.quantise import Int8Weights, quantise_rows
from tsqp.checkpoint.base import Checkpoint
from tsqp.config.groups import GroupKey, GroupName, cut, group_label, linear_groups, part_tensor
from tsqp.config.model import ModelConfig
from tsqp.config.shard import Shard
from tsqp.errors import UnsupportedModel


def load_quantised_group(checkpoint: Checkpoint, key: GroupKey, shard: Shard | None = None) -> Int8Weights:
    """Read one group and quantise it per output channel, on the CPU: all of it, or the output features of a shard.

    All parts are concatenated, and all numbers finite. Other rows are not read. To the bit, a slice is rows of the
    whole: each has a scale of its own. Raises CorruptCheckpoint; UnsupportedModel for weights that are not finite, or
    sums that int32 cannot hold.
    """
    name, layer = key
    group = linear_groups(checkpoint.config)[name]
    if group.in_features > MAX_FIELD_TERMS:
        raise UnsupportedModel(
            f"{group_label(key)} has {group.in_features} inputs, 8-bit products at most {MAX_FIELD_TERMS}: "
            "use protection open in a float dtype",
            fields=("protection",),
        )
    begin, stop = (0, group.out_features) if shard is None else shard.columns(group.out_features)
    here = cut(group, begin, stop)
    wq = torch.empty(here.out_features, here.in_features, dtype=torch.int8)
    scales = torch.empty(here.out_features, dtype=torch.float32)
    bias = torch.empty(here.out_features, dtype=torch.float32) if here.bias else None
    for index, (part, width) in enumerate(here.parts):
        if width == 0:
            continue
        skipped = max(0, begin - group.part_rows(index)[0])  # rows of this part before the slice
        first = here.part_rows(index)[0] - skipped
        rows = skipped, skipped + width
        for row, block in checkpoint.row_blocks(part_tensor(layer, part, "weight"), *rows):
            own = slice(first + row, first + row + len(block))
            wq[own], scales[own] = quantise_rows(block)
        if bias is not None:
            for row, block in checkpoint.row_blocks(part_tensor(layer, part, "bias"), *rows):
                bias[first + row : first + row + len(block)] = block
    # A weight that is not finite gives its row a scale that is not, so that the weights need no second pass.
    if not all(bool(values.isfinite().all()) for values in (scales, bias) if values is not None):
        raise UnsupportedModel(f"{group_label(key)} has weights that are not finite numbers: use another checkpoint")
    return Int8Weights(wq, scales, bias)


class GroupDigests:
    """SHA-256 for each group name over its 8-bit weights: all layers from ``first`` on in order, each row-major."""

    def __init__(self, first: int = 0) -> None:
        self._first = first
        self._hashes: dict[GroupName, hashlib._Hash] = {}
        self._next: dict[GroupName, int] = {}

    def add(self, key: GroupKey, wq: torch.Tensor) -> None:
        """Take one layer's ``wq``, int8 and contiguous on the CPU. Raises ValueError for a layer out of order."""
        name, layer = key
        expected = self._next.get(name, self._first)
        if (self._first if layer is None else layer) != expected:
            raise ValueError(f"{group_label(key)} is added where layer {expected} was expected")
        self._next[name] = expected + 1
        self._hashes.setdefault(name, hashlib.sha256()).update(wq.numpy().data)

    def hexdigests(self) -> dict[GroupName, str]:
        """64 hex digits for each group that was added."""
        return {name: digest.hexdigest() for name, digest in self._hashes.items()}


class ShardDigests:
    """The ``GroupDigests`` of several shards' workers, in one pass over whole groups of all layers in order."""

    def __init__(self, shards: Iterable[Shard], config: ModelConfig) -> None:
        self._config = config
        self._digests = {shard: GroupDigests(shard.first) for shard in shards}

    def add(self, key: GroupKey, wq: torch.Tensor) -> None:
        """Take one whole group of one layer, as ``GroupDigests.add``: each shard's rows of it are hashed in place."""
        for shard, digests in self._digests.items():
            if shard.has(key, self._config):
                begin, stop = shard.columns(len(wq))
                digests.add(key, wq[begin:stop])

    def hexdigests(self) -> dict[Shard, dict[GroupName, str]]:
        """Of each shard, 64 hex digits for each group that it has."""
        return {shard: digests.hexdigests() for shard, digests in self._digests.items()}
