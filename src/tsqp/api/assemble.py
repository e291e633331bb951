"""What every engine is put together from, whatever its partition, and the engine that has no worker."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast

import torch

from tsqp.api.adapters import NO_ADAPTERS, LoadedAdapters
from tsqp.api.kv_memory import fitting_kv_memory
from tsqp.api.memory_limits import available_bytes
from tsqp.api.plan import Plan
from tsqp.checkpoint.base import Checkpoint
from tsqp.config.dtype import PlainDtype
from tsqp.model.adapters import Adapters
from tsqp.model.cache import cache_dtype
from tsqp.model.decoder_layers import DecoderLayers, Norms
from tsqp.model.kernels import pick_kernels
from tsqp.model.local import LocalLinears, pick_attention
from tsqp.model.oblivious_embedding import GrowingEmbedding, embedding_here
from tsqp.model.operators import Attention, Embedding, Linears
from tsqp.model.weights import ModelWeights
from tsqp.progress import Progress, unseen
from tsqp.trusted.decode_step import DecodeStep
from tsqp.trusted.engine.decoder import Decoder
from tsqp.trusted.engine.engine import Engine
from tsqp.trusted.engine.limits import Limits
from tsqp.trusted.engine.micro_batches import micro_batches
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
    opened: ExitStack,
    limits: Limits | None = None,
    progress: Progress = unseen,
    adapters: LoadedAdapters = NO_ADAPTERS,
) -> Engine:
    """Everything on the trusted side. ``opened`` ends what works beside the engine."""
    dtype = cast(PlainDtype, plan.linear_dtype)
    weights = ModelWeights.load(checkpoint, dtype, torch.device("cpu"), progress=progress)
    progress("compiling loops")
    way = plan.oblivious_embedding
    embedding = embedding_here(weights.embedding, stats, oblivious=plan.oblivious, way=way, room=available_bytes())
    if isinstance(embedding, GrowingEmbedding):
        opened.callback(embedding.close)
    linears = LocalLinears(weights.groups, stats)
    placement = Placement(embedding, linears, attention_here(checkpoint, plan, stats))
    laid_out = adapters.for_layers(checkpoint.config, stats, own_products=True)
    decoder = build_decoder(checkpoint, plan, placement, stats, weights.norms, adapters=laid_out)
    return Engine(
        decoder,
        eos_token_ids,
        stats,
        limits=limits,
        kv_memory=kv_memory(plan),
        adapters=adapters.digests,
        oblivious=plan.oblivious,
    )


def attention_here(checkpoint: Checkpoint, plan: Plan, stats: Stats) -> Attention:
    """Attention in this process, where nothing is private."""
    compiled = plan.run.compute.compiled_kernels
    config = checkpoint.config
    return pick_attention(
        config.windows,
        cache_dtype(plan.kv_dtype),
        stats,
        compiled=compiled,
        scale=config.score_scale,
        cap=config.score_cap,
    )


def build_decoder(
    checkpoint: Checkpoint,
    plan: Plan,
    placement: Placement,
    stats: Stats,
    norms: Norms,
    step: DecodeStep | None = None,
    adapters: Adapters | None = None,
    device: str = "cpu",
) -> Decoder:
    """A decoder whose layers are on this side, and whose products are where ``placement`` says.

    ``device``: what the worker computes on.
    """
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
            layer_norm=checkpoint.config.layer_norm,
        ),
        stats,
        adapters,
    )
    return Decoder(
        layers,
        placement.embedding,
        dtype=dtype,
        cache_dtype=kept,
        max_rows=plan.run.compute.prefill_chunk,
        micro_batches=micro_batches(plan.run.compute.micro_batches, device),
        stats=stats,
        step=step,
    )


def kv_memory(plan: Plan) -> int:
    """Bytes for keys and values on this side: as asked for, or what fits."""
    return plan.run.compute.kv_memory or fitting_kv_memory()
