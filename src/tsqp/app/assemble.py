"""Puts an engine together: which side computes what is decided here, once, from the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tsqp.app.plan import Plan
from tsqp.checkpoint.base import Checkpoint
from tsqp.model.payload import TORCH_DTYPES
from tsqp.spec.partition import Partition
from tsqp.trusted.attention import Attention, LocalAttention, OpenAttention
from tsqp.trusted.decoder import Decoder, Norms
from tsqp.trusted.embedding import Embedding, LocalEmbedding, OpenEmbedding
from tsqp.trusted.engine import Engine
from tsqp.trusted.linears import Linears, LocalLinears, OpenLinears
from tsqp.trusted.session import WorkerSession
from tsqp.trusted.stats import Stats
from tsqp.wire.channel import Channel


@dataclass(frozen=True)
class Placement:
    """The objects that a partition is a choice of."""

    embedding: Embedding
    linears: Linears
    attention: Attention


def build_local_engine(checkpoint: Checkpoint, plan: Plan, stats: Stats) -> Engine:
    """Everything on the trusted side."""
    dtype = TORCH_DTYPES[plan.dtype]
    linears = LocalLinears.load(checkpoint, dtype, stats)
    tied = checkpoint.spec.tied_embeddings
    table = linears.head_weight if tied else _embedding_table(checkpoint, dtype)
    attention = LocalAttention(checkpoint.spec.windows, stats)
    return _build(checkpoint, plan, Placement(LocalEmbedding(table, stats), linears, attention), stats)


def build_split_engine(
    checkpoint: Checkpoint,
    plan: Plan,
    partition: Partition,
    dial: Callable[[], Channel],
    deadline_s: float,
    stats: Stats,
) -> tuple[Engine, WorkerSession]:
    """What ``partition`` names on the worker that ``dial`` connects to, the rest here; and the session with it.

    This side's weights are read before ``dial`` is called, so that a worker can load at the same time.
    """
    table = None if partition.remote_embedding else _embedding_table(checkpoint, TORCH_DTYPES[plan.dtype])
    session = WorkerSession(
        dial(),
        checkpoint.spec,
        checkpoint.fingerprint(),
        wire_dtype=plan.wire_dtype,
        dtype=plan.dtype,
        stats=stats,
        deadline_s=deadline_s,
    )
    placement = Placement(
        OpenEmbedding(session) if table is None else LocalEmbedding(table, stats),
        OpenLinears(session, split=partition.split_groups),
        OpenAttention(session) if partition.remote_attention else LocalAttention(checkpoint.spec.windows, stats),
    )
    return _build(checkpoint, plan, placement, stats), session


def _build(checkpoint: Checkpoint, plan: Plan, placement: Placement, stats: Stats) -> Engine:
    dtype = TORCH_DTYPES[plan.dtype]
    decoder = Decoder(
        checkpoint.spec,
        Norms.load(checkpoint, dtype),
        placement.embedding,
        placement.linears,
        placement.attention,
        dtype=dtype,
        max_rows=plan.prefill_chunk,
        stats=stats,
    )
    return Engine(decoder, checkpoint.text_format().eos_token_ids, stats)


def _embedding_table(checkpoint: Checkpoint, dtype: torch.dtype) -> torch.Tensor:
    """The embedding (vocab_size, hidden_size), the one large tensor of the trusted side."""
    return checkpoint.tensor("model.embed_tokens.weight").to(dtype, copy=True)
