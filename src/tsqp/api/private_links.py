"""Links of the private modes: every product of the worker is checked, and its inputs are masked where asked for.

Each link has a root of pads and check vectors that no other has had; ``docs/masking.md`` §4 and §5 say why.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Literal

import torch

from tsqp.api.assemble import Placement, build_decoder, kv_memory
from tsqp.api.links import Dial, Link, Stopped, never
from tsqp.api.pads import pool_targets
from tsqp.api.plan import Plan
from tsqp.api.rules import check_heads
from tsqp.checkpoint.base import Checkpoint
from tsqp.errors import ModelMismatch
from tsqp.model.block_attention import BlockAttention
from tsqp.model.cache import cache_dtype
from tsqp.model.decoder_layers import Norms
from tsqp.model.local import LocalEmbedding
from tsqp.progress import Progress, unseen
from tsqp.trusted.decode_step import DecodeStep, Model
from tsqp.trusted.engine.engine import Engine
from tsqp.trusted.engine.limits import Limits
from tsqp.trusted.engine.line import Line, PassDecoder
from tsqp.trusted.filler import PadFiller
from tsqp.trusted.guard.linears import MaskedLinears, VerifiedLinears
from tsqp.trusted.guard.sources import DealerPadSource, LocalPadSource, PadSource
from tsqp.trusted.metered import MeteredLinears, MeteredPool
from tsqp.trusted.pad_reserve import PadReserve
from tsqp.trusted.private import Guard, compile_loops, load_private_model
from tsqp.trusted.remote.session import WorkerSession
from tsqp.trusted.stats import Stats


class PrivateLinks:
    """See Links. The weights are read here, so that a worker can load at the same time.

    ``progress`` is told what takes long, up to the first link. Raises ModelMismatch for a model with another digest
    than the plan pins, and OptionError for heads that a cache of int8 cannot hold.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        dial_dealer: Dial | None,
        stats: Stats,
        progress: Progress = unseen,
    ) -> None:
        check_heads(plan.kv_dtype, checkpoint.config.head_dim)
        self._checkpoint, self._plan, self._dial_dealer, self._stats = checkpoint, plan, dial_dealer, stats
        self._fingerprint = checkpoint.fingerprint()
        table = checkpoint.tensor("model.embed_tokens.weight").clone()  # as it is stored: half the memory of float32
        self._norms = Norms.load(checkpoint, torch.float32)
        multiplies = plan.protection.masked and dial_dealer is None
        self._model = load_private_model(
            checkpoint,
            table,
            self._norms,
            checks=plan.run.guard.checks,
            keep_weights=multiplies,
            progress=progress,
        )
        self._fresh = True  # no connection has had the model's check vectors
        _check_pin(plan.run.guard.model_digest, self._model.digest)
        progress("compiling the guard's loops")
        compile_loops(masked=plan.protection.masked)
        self._embedding = LocalEmbedding(table, stats, torch.float32)
        self._attention = BlockAttention(checkpoint.config.windows, stats, checkpoint.config.score_scale)
        progress("compiling the loops of attention")
        self._attention.compile(cache_dtype(plan.kv_dtype))
        self._filler: PadFiller | None = None  # of a pool that is filled before its link is there
        self._guard: Guard | None = None  # of the last link
        self._reserve: PadReserve | None = None
        self._busy: Callable[[], bool] = lambda: False
        self._progress = progress

    def renew(self, stopped: Stopped) -> None:
        """See Links: fresh check vectors; and a new pool, which begins to fill while nobody needs the cores.

        Raises CorruptCheckpoint where the weights on the disk are others by now.
        """
        if self._fresh:
            return
        self._model = self._model.renewed(self._checkpoint, stopped)
        self._fresh = True
        if self._plan.protection.masked and self._dial_dealer is None:
            self._filler = self._new_filler(LocalPadSource())
            self._filler.start()

    def connect(self, dial: Dial, handshake_s: float | None = None) -> Link:
        """See Links. The check vectors are used up once the worker has been greeted, whatever becomes of the link."""
        self.renew(never)
        with ExitStack() as opened:
            worker = self._session(dial, self._stats, "worker", handshake_s, opened)
            dealer = None
            if self._dial_dealer is not None:
                self._progress("waiting for the dealer of pads")
                dealer = self._session(self._dial_dealer, Stats(), "dealer", handshake_s, opened)
            self._fresh = False
            guard = self._guarded(worker, dealer)
            opened.callback(guard.close)
            step = None
            if self._plan.run.guard.compiled_step:
                self._progress("compiling the loop of a decode step")
                kept = cache_dtype(self._plan.kv_dtype)
                model = Model(self._checkpoint.config, self._norms, self._attention, kept)
                step = DecodeStep.of(model, guard.linears, worker)
            linears = MeteredLinears(guard.linears, self._stats)
            placement = Placement(self._embedding, linears, self._attention)
            decoder = build_decoder(self._checkpoint, self._plan, placement, self._stats, self._norms, step)
            opened.pop_all()
        self._guard = guard = replace(guard, step=step)
        self._stats.guard = guard.report
        self._progress = unseen
        return Link(decoder, worker, guard)

    def resume(self, link: Link, stopped: Stopped) -> None:
        """See Links: the pads that requests were promised, and a thread that makes more."""
        filler = None if link.guard is None else link.guard.filler
        if filler is None:
            return
        if self._reserve is not None:
            self._reserve.renew(filler, stopped)
        filler.start()

    def engine(
        self,
        decoder: PassDecoder,
        eos_token_ids: tuple[int, ...],
        limits: Limits | None = None,
        line: Line | None = None,
    ) -> Engine:
        """An engine that begins with the decoder of the last link."""
        filler = None if self._guard is None else self._guard.filler
        if filler is not None and self._plan.run.guard.pads_empty == "refuse":
            self._reserve = PadReserve(filler)
        engine = Engine(
            decoder,
            eos_token_ids,
            self._stats,
            limits=limits,
            kv_memory=kv_memory(self._plan),
            same_bits=True,
            pads=self._reserve,
            line=line,
        )
        self._busy = engine.busy
        return engine

    def close(self) -> None:
        """Overwrite check vectors and pads that no link has had. Closing twice is allowed."""
        filler, self._filler = self._filler, None
        if filler is not None:
            filler.close()
            filler.pool.close()
        self._model.forget()

    def _new_filler(self, source: PadSource) -> PadFiller:
        """Of an empty pool with a new root."""
        options = self._plan.run.guard
        pool = MeteredPool(self._model.groups, source, self._stats, wait=options.pads_empty == "wait")
        return PadFiller(pool, pool_targets(self._checkpoint.config, options))

    def _guarded(self, worker: WorkerSession, dealer: WorkerSession | None) -> Guard:
        """The guard of a new link, with a new root of pads."""
        model, checks = self._model, self._plan.run.guard.checks
        earlier = {} if self._guard is None else self._guard.counted()
        if not self._plan.protection.masked:
            linears = VerifiedLinears(worker, model.groups)
            return Guard(linears, checks, model.digest, None, None, earlier=earlier)
        source = LocalPadSource() if dealer is None else DealerPadSource(dealer)
        filler, self._filler = self._filler or self._new_filler(source), None
        filler.busy = lambda: self._busy()
        masked = MaskedLinears(worker, model.groups, filler.pool)
        return Guard(masked, checks, model.digest, filler, dealer, earlier=earlier)

    def _session(
        self,
        dial: Dial,
        counted: Stats,
        role: Literal["worker", "dealer"],
        handshake_s: float | None,
        opened: ExitStack,
    ) -> WorkerSession:
        """A session that ``opened`` closes should the rest fail. Raises ChannelError."""
        session = WorkerSession(
            dial(),
            self._checkpoint.config,
            self._fingerprint,
            wire_dtype="float32",
            dtype="float32",
            stats=counted,
            deadline_s=self._plan.run.worker.deadline_s,
            handshake_s=handshake_s,
            path="field",
            digests=self._model.digests,
            role=role,
        )
        opened.callback(session.close)
        return session


def _check_pin(pinned: str | None, digest: str) -> None:
    """Raises ModelMismatch for another model than the one that was pinned, if one was."""
    if pinned is not None and pinned.lower() != digest:
        raise ModelMismatch(
            f"the checkpoint is not the one that was pinned: its digest is {digest}; give the pinned one as model, "
            "or this digest as guard.model_digest if this is the one you mean",
            fields=("guard.model_digest",),
        )
