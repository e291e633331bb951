"""Puts an engine together: which side computes what is decided here, once, from partition and protection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

from tsqp.checkpoint.base import Checkpoint
from tsqp.errors import OptionError
from tsqp.model.payload import TORCH_DTYPES
from tsqp.spec.dtype import DTYPE_NAMES, DtypeName
from tsqp.spec.partition import PARTITIONS, Partition
from tsqp.spec.protection import PROTECTIONS, Protection
from tsqp.trusted.attention import Attention, LocalAttention, OpenAttention
from tsqp.trusted.decoder import Decoder, Norms
from tsqp.trusted.embedding import Embedding, LocalEmbedding, OpenEmbedding
from tsqp.trusted.linears import Linears, LocalLinears, OpenLinears
from tsqp.trusted.session import WorkerSession
from tsqp.trusted.stats import Stats

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What was asked for, checked: a run never differs from its plan.

    ``partition`` is None at ``local``, where nothing is split.
    """

    protection: Protection
    partition: Partition | None
    dtype: DtypeName
    wire_dtype: DtypeName
    prefill_chunk: int

    @classmethod
    def check(cls, *, protection: str, partition: str, dtype: str, wire_dtype: str | None, prefill_chunk: int) -> Plan:
        """Look up every name. Raises OptionError that lists what there is."""
        chosen = _named("protection", protection, PROTECTIONS)
        split = _named("partition", partition, PARTITIONS)
        if chosen.uses_worker and split.name not in chosen.partitions:
            allowed = ", ".join(chosen.partitions)
            raise OptionError(f"protection {chosen.name} cannot use partition {split.name}: use {allowed}")
        if prefill_chunk < 1:
            raise OptionError(f"the prefill chunk must be at least 1 row, not {prefill_chunk}")
        return cls(
            protection=chosen,
            partition=split if chosen.uses_worker else None,
            dtype=_named("dtype", dtype, {name: name for name in DTYPE_NAMES}),
            wire_dtype=_named("wire dtype", wire_dtype or dtype, {name: name for name in DTYPE_NAMES}),
            prefill_chunk=prefill_chunk,
        )


def _named(what: str, name: str, table: dict[str, T]) -> T:
    if name not in table:
        raise OptionError(f"unknown {what} '{name}': use {', '.join(table)}")
    return table[name]


@dataclass(frozen=True)
class Placement:
    """The objects that a partition is a choice of."""

    embedding: Embedding
    linears: Linears
    attention: Attention


def build_decoder(checkpoint: Checkpoint, plan: Plan, placement: Placement, stats: Stats) -> Decoder:
    """A decoder over its placement, with the norm weights that the trusted side always holds."""
    dtype = TORCH_DTYPES[plan.dtype]
    return Decoder(
        checkpoint.spec,
        Norms.load(checkpoint, dtype),
        placement.embedding,
        placement.linears,
        placement.attention,
        dtype=dtype,
        max_rows=plan.prefill_chunk,
        stats=stats,
    )


def place_locally(checkpoint: Checkpoint, dtype: torch.dtype, stats: Stats) -> Placement:
    """Everything on the trusted side."""
    linears = LocalLinears.load(checkpoint, dtype, stats)
    tied = checkpoint.spec.tied_embeddings
    table = linears.head_weight if tied else embedding_table(checkpoint, dtype)
    return Placement(LocalEmbedding(table, stats), linears, LocalAttention(checkpoint.spec.windows, stats))


def place_on_worker(
    session: WorkerSession, partition: Partition, table: torch.Tensor | None, stats: Stats
) -> Placement:
    """What ``partition`` names on the worker, the rest here. ``table`` is the embedding, if that is here."""
    return Placement(
        OpenEmbedding(session) if table is None else LocalEmbedding(table, stats),
        OpenLinears(session, split=partition.split_groups),
        OpenAttention(session) if partition.remote_attention else LocalAttention(session.spec.windows, stats),
    )


def embedding_table(checkpoint: Checkpoint, dtype: torch.dtype) -> torch.Tensor:
    """The embedding (vocab_size, hidden_size), the one large tensor of the trusted side."""
    return checkpoint.tensor("model.embed_tokens.weight").to(dtype, copy=True)
