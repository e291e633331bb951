"""What a worker holds: every linear group of a model on its device, and the embedding table. Public data only."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tsqp.checkpoint.base import Checkpoint
from tsqp.model.linear import GroupKey, LinearWeights, group_keys, load_group
from tsqp.spec.model import ModelSpec


@dataclass(frozen=True)
class WorkerWeights:
    """Weights in the compute dtype on one device. ``embedding`` is (vocab_size, hidden_size)."""

    spec: ModelSpec
    fingerprint: str
    dtype: torch.dtype
    device: torch.device
    groups: dict[GroupKey, LinearWeights]
    embedding: torch.Tensor

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> WorkerWeights:
        """Read a checkpoint onto a device. Raises CheckpointError."""
        spec = checkpoint.spec
        groups = {key: load_group(checkpoint, key, dtype, device) for key in group_keys(spec)}
        if spec.tied_embeddings:
            embedding = groups["lm_head", None].weight
        else:
            embedding = checkpoint.tensor("model.embed_tokens.weight").to(device, dtype)
        return cls(spec, checkpoint.fingerprint(), dtype, device, groups, embedding)
