"""Links of the private modes: every product of the worker is checked, and its inputs are masked where asked for.

Each link has a root of pads and check vectors that no other has had; ``docs/masking.md`` §4 and §5 say why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch

from tsqp.api.adapters import NO_ADAPTERS, LoadedAdapters
from tsqp.api.assemble import Placement, build_decoder, kv_memory
from tsqp.api.freed_memory import give_back_freed_memory
from tsqp.api.links import Link, Reach
from tsqp.api.memory_limits import available_bytes
from tsqp.api.pads import pool_targets
from tsqp.api.plan import Plan
from tsqp.api.private_sessions import PrivateSessions, tiling_of
from tsqp.api.rules import check_heads
from tsqp.api.until import Stopped, Until
from tsqp.checkpoint.base import Checkpoint
from tsqp.config.shard import Shard
from tsqp.config.tiling import Tiling
from tsqp.errors import ModelMismatch
from tsqp.model.block_attention import BlockAttention
from tsqp.model.cache import cache_dtype
from tsqp.model.decoder_layers import Norms
from tsqp.model.oblivious_embedding import GrowingEmbedding, embedding_here
from tsqp.progress import Progress, unseen
from tsqp.trusted.dealers import Dealers, DealtPool
from tsqp.trusted.decode_step import DecodeStep, Model
from tsqp.trusted.engine.engine import Engine
from tsqp.trusted.engine.limits import Limits
from tsqp.trusted.engine.line import Line, PassDecoder
from tsqp.trusted.filler import PadFiller
from tsqp.trusted.guard.linears import MaskedLinears, VerifiedLinears
from tsqp.trusted.guard.sources import LocalPadSource
from tsqp.trusted.metered import MeteredLinears, MeteredPool
from tsqp.trusted.pad_reserve import PadReserve
from tsqp.trusted.private import Guard, compile_loops, load_private_model
from tsqp.trusted.remote.session import WorkerSession
from tsqp.trusted.remote.team import Team
from tsqp.trusted.stats import Stats


class PrivateLinks:
    """See Links. The weights are read here, so that a worker can load at the same time.

    ``progress`` is told what takes long, up to the first link. ``shards``: of the workers that are expected, if several
    are: then the first of them have not to wait until the weights are read a second time. Raises ModelMismatch for a
    model with another digest than the plan pins, and OptionError for heads that a cache of int8 cannot hold.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        dial_dealers: Reach | None,
        stats: Stats,
        progress: Progress = unseen,
        adapters: LoadedAdapters = NO_ADAPTERS,
        shards: Sequence[Shard] = (),
    ) -> None:
        check_heads(plan.kv_dtype, checkpoint.config.head_dim)
        self._checkpoint, self._plan, self._dial_dealers, self._stats = checkpoint, plan, dial_dealers, stats
        self._sessions = PrivateSessions(checkpoint.config, checkpoint.fingerprint(), plan.run.worker.deadline_s)
        progress("reading the embedding")
        table = checkpoint.copy("model.embed_tokens.weight")  # as it is stored: half the memory of float32
        self._norms = Norms.load(checkpoint, torch.float32)
        multiplies = plan.protection.masked and dial_dealers is None
        self._model = load_private_model(
            checkpoint,
            table,
            self._norms,
            checks=plan.run.guard.checks,
            keep_weights=multiplies,
            progress=progress,
            tiling=Tiling(shards, checkpoint.config) if shards else None,
        )
        self._fresh = True  # no connection has had the model's check vectors
        self._digest, self._names = adapters.run_digest(self._model.digest), tuple(adapters.digests)
        _check_pin(plan.run.guard.model_digest, self._digest)
        self._adapters = adapters.for_layers(checkpoint.config, stats, own_products=True)
        progress("compiling the guard's loops")
        compile_loops(masked=plan.protection.masked)
        way = plan.oblivious_embedding
        self._embedding = embedding_here(
            table, stats, torch.float32, oblivious=plan.oblivious, way=way, room=available_bytes()
        )
        config = checkpoint.config
        self._attention = BlockAttention(config.windows, stats, config.score_scale, config.score_cap)
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
        self._model = self._model.renewed(self._checkpoint, stopped, self._model.tiling)
        self._fresh = True
        if self._plan.protection.masked and self._dial_dealers is None:
            self._filler = self._new_filler(None)
            self._filler.start()

    def connect(self, dial: Reach, until: Until) -> Link:
        """See Links. The check vectors are used up once the worker has been greeted, whatever becomes of the link."""
        self.renew(until.stopped)
        with ExitStack() as opened:
            worker = self._workers(dial, until, opened)
            dealers = None
            if self._dial_dealers is not None:
                self._progress("waiting for the dealer of pads")
                until = until.again()  # the worker may have taken long to start
                dealers = self._sessions.dealers(self._dial_dealers(until), self._model.digests, until)
                opened.callback(dealers.close)
            self._fresh = False
            guard = self._guarded(worker, dealers)
            opened.callback(guard.close)
            step = None
            if self._plan.run.guard.compiled_step and isinstance(worker, WorkerSession):  # a team has the plain way
                self._progress("compiling the loop of a decode step")
                kept = cache_dtype(self._plan.kv_dtype)
                model = Model(self._checkpoint.config, self._norms, self._attention, kept, self._adapters)
                step = DecodeStep.of(model, guard.linears, worker)
            linears = MeteredLinears(guard.linears, self._stats)
            placement = Placement(self._embedding, linears, self._attention)
            decoder = build_decoder(
                self._checkpoint,
                self._plan,
                placement,
                self._stats,
                self._norms,
                step,
                self._adapters,
                device=worker.welcome.device,
            )
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
            adapters=self._names,
            oblivious=self._plan.oblivious,
        )
        self._busy = engine.busy
        return engine

    def close(self) -> None:
        """Overwrite check vectors and pads that no link has had. Closing twice is allowed."""
        self._drop_filler()
        if isinstance(self._embedding, GrowingEmbedding):
            self._embedding.close()
        self._model.forget()

    def _new_filler(self, dealers: Dealers | None) -> PadFiller:
        """Of an empty pool with a new root; this process multiplies where there are no dealers."""
        options = self._plan.run.guard
        groups, wait = self._model.groups, options.pads_empty == "wait"
        if dealers is None:
            pool = MeteredPool(groups, LocalPadSource(), self._stats, wait=wait)
        else:
            pool = DealtPool(groups, dealers, self._stats, wait=wait)
        filler = PadFiller(pool, pool_targets(self._checkpoint.config, options))
        filler.filled = give_back_freed_memory  # which making them has left in heaps, for the next link to add to
        return filler

    def _guarded(self, worker: WorkerSession | Team, dealers: Dealers | None) -> Guard:
        """The guard of a new link, with a new root of pads."""
        model, checks = self._model, self._plan.run.guard.checks
        earlier = {} if self._guard is None else self._guard.counted()
        if not self._plan.protection.masked:
            linears = VerifiedLinears(worker, model.groups)
            return Guard(linears, checks, self._digest, None, None, earlier=earlier)
        filler, self._filler = self._filler or self._new_filler(dealers), None
        filler.busy = lambda: self._busy()
        masked = MaskedLinears(worker, model.groups, filler.pool)
        return Guard(masked, checks, self._digest, filler, dealers, earlier=earlier)

    def _workers(self, dial: Reach, until: Until, opened: ExitStack) -> WorkerSession | Team:
        """A session with one worker, or a team, which ``opened`` closes should the rest fail. Raises ChannelError."""
        dialled = dial(until)
        for one in dialled:
            opened.callback(one.channel.close)
        tiling = tiling_of(dialled, self._checkpoint.config)
        self._divide(tiling, until.stopped)
        worker: WorkerSession | Team
        if tiling is None:
            worker = self._sessions.one(dialled[0].channel, self._stats, self._model.digests, until)
        else:
            worker = self._sessions.team(dialled, self._model, tiling, self._stats, until)
        opened.callback(worker.close)
        return worker

    def _divide(self, tiling: Tiling | None, stopped: Stopped) -> None:
        """Check vectors for the slices of these workers, if those that were made are for others.

        Raises ChannelClosed where ``stopped``.
        """
        undivided = all(one is None or len(one.shards) == 1 for one in (tiling, self._model.tiling))
        if undivided or tiling == self._model.tiling:
            return
        self._progress("dividing the model among its workers")
        self._drop_filler()
        earlier, self._model = self._model, self._model.renewed(self._checkpoint, stopped, tiling)
        earlier.forget()

    def _drop_filler(self) -> None:
        filler, self._filler = self._filler, None
        if filler is not None:
            filler.close()
            filler.pool.close()


def _check_pin(pinned: str | None, digest: str) -> None:
    """Raises ModelMismatch for another model than the one that was pinned, if one was."""
    if pinned is not None and pinned.lower() != digest:
        raise ModelMismatch(
            f"the checkpoint, with its adapters, is not the one that was pinned: its digest is {digest}; give the "
            "pinned one as model, or this digest as guard.model_digest if this is the one you mean",
            fields=("guard.model_digest",),
        )
