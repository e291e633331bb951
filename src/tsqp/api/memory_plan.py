"""How much memory the weights of a run take on each side, and what comes on top: from the shape of a model alone.

What each process takes for its libraries (0.5 GB, docs/operations.md §9) and for a moment while it loads (one part of a
tensor: some 60 MB) is not in here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tsqp.api.config import GuardConfig
from tsqp.api.pads import pool_targets
from tsqp.api.plan import Plan
from tsqp.checkpoint.base import Checkpoint
from tsqp.checkpoint.shapes import EMBEDDING
from tsqp.config.dtype import ITEM_BYTES, ComputeDtype, DtypeName, float_dtype
from tsqp.config.groups import LAYER_GROUPS, LinearGroup, linear_groups
from tsqp.config.model import ModelConfig
from tsqp.model.cache import KVCache, cache_dtype
from tsqp.trusted.filler import block_bytes

KV_TOKENS = 1024  # a multiple of what a cache grows by
_FLOAT = 4
_BOUNDS = 2 * 8  # of one slice, in int64


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes. ``worker`` and ``trusted``: the weights of each side and what belongs to them.

    ``kv``: keys and values of ``KV_TOKENS`` tokens of one text, on the trusted side; ``pads``: of a full pool there.
    """

    worker: int
    trusted: int
    kv: int
    pads: int


def memory_plan(checkpoint: Checkpoint, plan: Plan) -> MemoryPlan:
    """Of a run at partition ``linear``, or at ``local``. No weight is read."""
    config, protection = checkpoint.config, plan.protection
    kv = KVCache(config, cache_dtype(plan.kv_dtype)).bytes_for(KV_TOKENS)
    if protection.checked:
        multiplies = protection.masked and plan.run.guard.dealer is None
        trusted = guarded_bytes(checkpoint, plan.run.guard.checks, multiplies=multiplies)
        pads = pool_size(config, plan.run.guard) if protection.masked else 0
        return MemoryPlan(integer_bytes(config), trusted, kv, pads)
    whole = whole_bytes(checkpoint, plan.linear_dtype)
    if plan.partition is None:
        return MemoryPlan(0, whole, kv, 0)
    here = embedding_bytes(config, ITEM_BYTES[plan.dtype]) + norm_bytes(checkpoint, plan.dtype)
    return MemoryPlan(whole, here, kv, 0)


def integer_bytes(config: ModelConfig) -> int:
    """8-bit weights of every group, and what their kernel keeps for each output."""
    return sum(group.out_features * (group.in_features + 4) for group in _all_groups(config))


def guarded_bytes(checkpoint: Checkpoint, checks: int, *, multiplies: bool) -> int:
    """What the trusted side of a private mode holds: the embedding as it is stored, norms, and something of each group.

    That is scales, biases, where its one slice begins and ends, ``checks`` check vectors and their products with the
    weights, and the 8-bit weights themselves where it ``multiplies`` pads.
    """
    config = checkpoint.config
    vectors = sum(
        _FLOAT * (2 * group.out_features + checks * (group.in_features + group.out_features)) + _BOUNDS
        for group in _all_groups(config)
    )
    table = embedding_bytes(config, checkpoint.dtype(EMBEDDING).itemsize)
    return table + norm_bytes(checkpoint, "float32") + vectors + (integer_bytes(config) if multiplies else 0)


def whole_bytes(checkpoint: Checkpoint, compute: ComputeDtype) -> int:
    """A whole model: on a worker at ``open``, on this side at ``local``. A tied head is the embedding, but in int8."""
    config, dtype = checkpoint.config, float_dtype(compute)
    item = ITEM_BYTES[dtype]
    if compute == "int8":
        vectors = sum(_FLOAT * group.out_features * (1 + group.bias) for group in _all_groups(config))
        groups, table = integer_bytes(config) + vectors, True
    else:
        groups = sum(item * group.out_features * (group.in_features + group.bias) for group in _all_groups(config))
        table = not config.tied_embeddings
    return groups + table * embedding_bytes(config, item) + norm_bytes(checkpoint, dtype)


def pool_size(config: ModelConfig, options: GuardConfig) -> int:
    """Pads that are kept ready: as many as were asked for and memory allows."""
    groups = linear_groups(config)
    return sum(
        blocks * block_bytes(groups[key[0]].out_features) for key, blocks in pool_targets(config, options).items()
    )


def embedding_bytes(config: ModelConfig, item: int) -> int:
    return item * config.vocab_size * config.hidden_size


def norm_bytes(checkpoint: Checkpoint, dtype: DtypeName) -> int:
    norms = (prod(shape) for name, shape in checkpoint.shapes.items() if name.endswith("norm.weight"))
    return ITEM_BYTES[dtype] * sum(norms)


def _all_groups(config: ModelConfig) -> list[LinearGroup]:
    groups = linear_groups(config)
    return [group for name, group in groups.items() for _ in range(config.num_layers if name in LAYER_GROUPS else 1)]
