"""Puts an engine together: which side computes what is decided here, once, from the plan."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch

from tsqp.api.kv_memory import fitting_kv_memory
from tsqp.api.pads import pool_targets
from tsqp.api.plan import Plan
from tsqp.api.rules import check_heads
from tsqp.checkpoint.base import Checkpoint
from tsqp.config.dtype import PlainDtype, numeric_path
from tsqp.config.partition import Partition
from tsqp.errors import ModelMismatch
from tsqp.model.block_attention import BlockAttention
from tsqp.model.cache import cache_dtype
from tsqp.model.decoder_layers import DecoderLayers, Norms
from tsqp.model.kernels import pick_kernels
from tsqp.model.local import LocalEmbedding, LocalLinears, pick_attention
from tsqp.model.operators import Attention, Embedding, Linears
from tsqp.model.weights import ModelWeights
from tsqp.trusted.decode_step import DecodeStep, Model
from tsqp.trusted.engine.decoder import Decoder
from tsqp.trusted.engine.engine import Engine
from tsqp.trusted.engine.limits import Limits
from tsqp.trusted.filler import PadFiller
from tsqp.trusted.guard.linears import CheckedLinears, MaskedLinears, VerifiedLinears
from tsqp.trusted.guard.sources import DealerPadSource, LocalPadSource
from tsqp.trusted.metered import MeteredLinears, MeteredPool
from tsqp.trusted.pad_reserve import PadReserve
from tsqp.trusted.private import Guard, PrivateModel, compile_loops, load_private_model
from tsqp.trusted.remote.attention import OpenAttention
from tsqp.trusted.remote.embedding import OpenEmbedding
from tsqp.trusted.remote.layers import LayerDecoder
from tsqp.trusted.remote.linears import OpenLinears
from tsqp.trusted.remote.session import WorkerSession
from tsqp.trusted.stats import Stats
from tsqp.wire.channel import Channel
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
) -> Engine:
    """Everything on the trusted side."""
    weights = ModelWeights.load(checkpoint, cast(PlainDtype, plan.linear_dtype), torch.device("cpu"))
    embedding, linears = LocalEmbedding(weights.embedding, stats), LocalLinears(weights.groups, stats)
    placement = Placement(embedding, linears, _attention(checkpoint, plan, stats))
    decoder = _decoder(checkpoint, plan, placement, stats, weights.norms)
    return Engine(decoder, eos_token_ids, stats, limits=limits, kv_memory=_kv_memory(plan))


def build_split_engine(
    checkpoint: Checkpoint,
    plan: Plan,
    partition: Partition,
    dial: Callable[[], Channel],
    eos_token_ids: tuple[int, ...],
    stats: Stats,
    limits: Limits | None = None,
) -> tuple[Engine, WorkerSession]:
    """What ``partition`` names on the worker that ``dial`` connects to, the rest here; and the session with it.

    This side's weights are read before ``dial`` is called, so that a worker can load at the same time.
    """
    table = None if partition.remote_embedding else _embedding_table(checkpoint, TORCH_DTYPES[plan.dtype])
    session = WorkerSession(
        dial(),
        checkpoint.config,
        checkpoint.fingerprint(),
        wire_dtype=plan.wire_dtype,
        dtype=plan.dtype,
        stats=stats,
        deadline_s=plan.run.worker.deadline_s,
        path=numeric_path(plan.linear_dtype),
    )
    if partition.whole_layers:
        remote = LayerDecoder(session, max_rows=plan.run.compute.prefill_chunk)
        return Engine(remote, eos_token_ids, stats, limits=limits), session
    placement = Placement(
        OpenEmbedding(session) if table is None else LocalEmbedding(table, stats),
        OpenLinears(session, split=partition.split_groups),
        OpenAttention(session) if partition.remote_attention else _attention(checkpoint, plan, stats),
    )
    decoder = _decoder(checkpoint, plan, placement, stats)
    return Engine(decoder, eos_token_ids, stats, limits=limits, kv_memory=_kv_memory(plan)), session


def build_private_engine(
    checkpoint: Checkpoint,
    plan: Plan,
    dial: Callable[[], Channel],
    dial_dealer: Callable[[], Channel] | None,
    eos_token_ids: tuple[int, ...],
    stats: Stats,
    limits: Limits | None = None,
) -> tuple[Engine, WorkerSession, Guard]:
    """Linear layers on the worker that ``dial`` connects to, each product checked, the inputs masked where asked for.

    Raises ModelMismatch also for a model with another digest than the plan pins, and OptionError for heads that a cache
    of int8 cannot hold.
    """
    check_heads(plan.kv_dtype, checkpoint.config.head_dim)
    table = checkpoint.tensor("model.embed_tokens.weight").clone()  # as it is stored: half the memory of float32
    norms = Norms.load(checkpoint, torch.float32)
    multiplies = plan.protection.masked and dial_dealer is None
    model = load_private_model(checkpoint, table, norms, checks=plan.run.guard.checks, keep_weights=multiplies)
    _check_pin(plan.run.guard.model_digest, model.digest)
    compile_loops(masked=plan.protection.masked)
    with ExitStack() as opened:
        for group in model.groups.values():
            opened.callback(group.forget)
        guard, worker = _open_guard(checkpoint, plan, model, dial, dial_dealer, stats, opened)
        embedding = LocalEmbedding(table, stats, torch.float32)
        attention = BlockAttention(checkpoint.config.windows, stats)
        kept = cache_dtype(plan.kv_dtype)
        attention.compile(kept)
        placement = Placement(embedding, MeteredLinears(guard.linears, stats), attention)
        step = None
        if plan.run.guard.compiled_step:
            step = DecodeStep.of(Model(checkpoint.config, norms, attention, kept), guard.linears, worker)
            guard = replace(guard, step=step)
        reserve = None
        if guard.filler is not None and plan.run.guard.pads_empty == "refuse":
            reserve = PadReserve(guard.filler)
        engine = Engine(
            _decoder(checkpoint, plan, placement, stats, norms, step),
            eos_token_ids,
            stats,
            limits=limits,
            kv_memory=_kv_memory(plan),
            same_bits=True,
            pads=reserve,
        )
        opened.pop_all()
    stats.guard = guard.report
    if guard.filler is not None:
        guard.filler.busy = engine.busy
    return engine, worker, guard


def _open_guard(
    checkpoint: Checkpoint,
    plan: Plan,
    model: PrivateModel,
    dial: Callable[[], Channel],
    dial_dealer: Callable[[], Channel] | None,
    stats: Stats,
    opened: ExitStack,
) -> tuple[Guard, WorkerSession]:
    """The guard with its sessions, each of which ``opened`` closes should the rest fail. Raises ChannelError."""

    def session(dial_one: Callable[[], Channel], counted: Stats, role: Literal["worker", "dealer"]) -> WorkerSession:
        one = WorkerSession(
            dial_one(),
            checkpoint.config,
            checkpoint.fingerprint(),
            wire_dtype="float32",
            dtype="float32",
            stats=counted,
            deadline_s=plan.run.worker.deadline_s,
            path="field",
            digests=model.digests,
            role=role,
        )
        opened.callback(one.close)
        return one

    options = plan.run.guard
    worker = session(dial, stats, "worker")
    linears: CheckedLinears = VerifiedLinears(worker, model.groups)
    dealer = filler = None
    if plan.protection.masked:
        if dial_dealer is not None:
            dealer = session(dial_dealer, Stats(), "dealer")
        source = LocalPadSource() if dealer is None else DealerPadSource(dealer)
        pool = MeteredPool(model.groups, source, stats, wait=options.pads_empty == "wait")
        filler = PadFiller(pool, pool_targets(checkpoint.config, options))
        linears = MaskedLinears(worker, model.groups, pool)
    guard = Guard(linears, options.checks, model.digest, filler, dealer)
    opened.callback(guard.close)
    return guard, worker


def _check_pin(pinned: str | None, digest: str) -> None:
    """Raises ModelMismatch for another model than the one that was pinned, if one was."""
    if pinned is not None and pinned.lower() != digest:
        raise ModelMismatch(
            f"the checkpoint is not the one that was pinned: its digest is {digest}; give the pinned one as model, "
            "or this digest as guard.model_digest if this is the one you mean",
            fields=("guard.model_digest",),
        )


def _attention(checkpoint: Checkpoint, plan: Plan, stats: Stats) -> Attention:
    """Attention in this process, where nothing is private."""
    compiled = plan.run.compute.compiled_kernels
    return pick_attention(checkpoint.config.windows, cache_dtype(plan.kv_dtype), stats, compiled=compiled)


def _decoder(
    checkpoint: Checkpoint,
    plan: Plan,
    placement: Placement,
    stats: Stats,
    norms: Norms | None = None,
    step: DecodeStep | None = None,
) -> Decoder:
    dtype, kept = TORCH_DTYPES[plan.dtype], cache_dtype(plan.kv_dtype)
    layers = DecoderLayers(
        checkpoint.config,
        norms or Norms.load(checkpoint, dtype),
        placement.linears,
        placement.attention,
        pick_kernels(dtype, compiled=plan.run.compute.compiled_kernels, cache_dtype=kept),
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


def _kv_memory(plan: Plan) -> int:
    """Bytes for keys and values on this side: as asked for, or what fits."""
    return plan.run.compute.kv_memory or fitting_kv_memory()


def _embedding_table(checkpoint: Checkpoint, dtype: torch.dtype) -> torch.Tensor:
    """The embedding (vocab_size, hidden_size), the one large tensor of the trusted side."""
    return checkpoint.tensor("model.embed_tokens.weight").to(dtype, copy=True)
