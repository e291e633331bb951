"""A whole model in floats or int8, on whichever side computes all of it or its linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tsqp.arith.product import DigitKernel
from tsqp.arith.self_test import pick_kernel
from tsqp.checkpoint.base import Checkpoint
from tsqp.config.dtype import PlainDtype, float_dtype
from tsqp.config.groups import GroupKey
from tsqp.config.model import ModelConfig
from tsqp.model.decoder_layers import Norms
from tsqp.model.int8 import load_int8_groups
from tsqp.model.kernels import Kernels
from tsqp.model.linear import LinearProduct, load_groups
from tsqp.progress import Progress, unseen
from tsqp.wire.payload import TORCH_DTYPES


@dataclass(frozen=True)
class ModelWeights:
    """Weights on one device. ``compute`` is what linear layers are computed in; everything else is in ``dtype``.

    ``embedding`` is (vocab_size, hidden_size). ``kernels``: compiled ones for element-wise operators on the device.
    """

    config: ModelConfig
    compute: PlainDtype
    dtype: torch.dtype
    device: torch.device
    groups: Mapping[GroupKey, LinearProduct]
    embedding: torch.Tensor
    norms: Norms
    kernels: Kernels | None = None

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        compute: PlainDtype,
        device: torch.device,
        *,
        kernel: DigitKernel | None = None,
        progress: Progress = unseen,
    ) -> ModelWeights:
        """Read a checkpoint onto a device; ``kernel`` for int8 is chosen by a self-test unless given.

        Raises CheckpointError.
        """
        config = checkpoint.config
        dtype = TORCH_DTYPES[float_dtype(compute)]
        groups: Mapping[GroupKey, LinearProduct]
        if compute == "int8":
            groups = load_int8_groups(checkpoint, kernel or pick_kernel(device), dtype, device, progress)
            embedding = None
        else:
            groups = floats = load_groups(checkpoint, dtype, device, progress)
            embedding = floats["lm_head", None].weight if config.tied_embeddings else None
        if embedding is None:
            progress("reading the embedding")
            embedding = checkpoint.copy("model.embed_tokens.weight", dtype, device)
        norms = Norms.load(checkpoint, dtype, device)
        return cls(config, compute, dtype, device, groups, embedding, norms)
