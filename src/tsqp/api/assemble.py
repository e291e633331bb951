"""What every engine is put together from, whatever its partition, and the engine that has no worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch

from tsqp.api.kv_memory import fitting_kv_memory
from tsqp.api.plan import Plan
from tsqp.checkpoint.base import Checkpoint
from tsqp.config.dtype import PlainDtype
from tsqp.model.cache import cache_dtype
from tsqp.model.decoder_layers import DecoderLayers, Norms
from tsqp.model.kernels import pick_kernels
from tsqp.model.local import LocalEmbedding, LocalLinears, pick_attention
from tsqp.model.operators import Attention, Embedding, Linears
from tsqp.model.weights import ModelWeights
from tsqp.progress import Progress, unseen
from tsqp.trusted.decode_step import DecodeStep
from tsqp.trusted.engine.decoder import Decoder
from tsqp.trusted.engine.engine import Engine
from tsqp.trusted.engine.limits import Limits
from tsqp.trusted.stats import Stats
from tsqp.wire.payload import TORCH_DTYPES


@dataclass(frozen=True)
class Placement:
    """The objects that a partition is a choice of."""

    embedding: Embedding
    linears: Linears
    attention: Attention


def build_local_engine(
    checkpoint: Checkpoint,
    plan: Plan,
    eos_token_ids: tuple[int, ...],
    stats: Stats,
    limits: Limits | None = None,
    progress: Progress = unseen,
) -> Engine:
    """Everything on the trusted side."""
    dtype = cast(PlainDtype, plan.linear_dtype)
    weights = ModelWeights.load(checkpoint, dtype, torch.device("cpu"), progress=progress)
    progress("compiling loops")
    embedding, linears = LocalEmbedding(weights.embedding, stats), LocalLinears(weights.groups, stats)
    placement = Placement(embedding, linears, attention_here(checkpoint, plan, stats))
    decoder = build_decoder(checkpoint, plan, placement, stats, weights.norms)
    return Engine(decoder, eos_token_ids, stats, limits=limits, kv_memory=kv_memory(plan))


def attention_here(checkpoint: Checkpoint, plan: Plan, stats: Stats) -> Attention:
    """Attention in this process, where nothing is private."""
    compiled = plan.run.compute.compiled_kernels
    config = checkpoint.config
    return pick_attention(
        config.windows, cache_dtype(plan.kv_dtype), stats, compiled=compiled, scale=config.score_scale
    )


def build_decoder(
    checkpoint: Checkpoint,
    plan: Plan,
    placement: Placement,
    stats: Stats,
    norms: Norms,
    step: DecodeStep | None = None,
) -> Decoder:
    """A decoder whose layers are on this side, and whose products are where ``placement`` says."""
    dtype, kept = TORCH_DTYPES[plan.dtype], cache_dtype(plan.kv_dtype)
    layers = DecoderLayers(
        checkpoint.config,
        norms,
        placement.linears,
        placement.attention,
        pick_kernels(
            dtype,
            compiled=plan.run.compute.compiled_kernels,
            cache_dtype=kept,
            activation=checkpoint.config.activation,
        ),
        stats,
    )
    return Decoder(
        layers,
        placement.embedding,
        dtype=dtype,
        cache_dtype=kept,
        max_rows=plan.run.compute.prefill_chunk,
        micro_batches=plan.run.compute.micro_batches,
        stats=stats,
        step=step,
    )


def kv_memory(plan: Plan) -> int:
    """Bytes for keys and values on this side: as asked for, or what fits."""
    return plan.run.compute.kv_memory or fitting_kv_memory()
