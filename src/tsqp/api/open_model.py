"""An open model: its engine, its workers and whatever else is open with it, from the opening until ``close``.

A worker that is started here loads the model while this process loads torch and reads its own share.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tsqp.api.adapters import NO_ADAPTERS, LoadedAdapters, load_adapters
from tsqp.api.config import ComputeConfig, RunConfig
from tsqp.api.dealer import Connect, Dealer, DealerRoster
from tsqp.api.freed_memory import give_back_freed_memory
from tsqp.api.kernel_cache import keep_loops
from tsqp.api.parties import Channels, dialling_dealers, worker_places
from tsqp.api.places import Place, StartedHere
from tsqp.api.plan import Plan
from tsqp.api.roster_place import RosterPlace
from tsqp.api.worker_state import WorkerState
from tsqp.checkpoint import locate, open_checkpoint, stored_dtype
from tsqp.checkpoint.contents import read_line
from tsqp.cores import cores
from tsqp.errors import ChannelError, TsqpWarning, WorkerLost
from tsqp.progress import Progress, Timings
from tsqp.tee.hardening import harden_process
from tsqp.tee.memory import lock_memory, swap_bytes
from tsqp.trusted.stats import Stats
from tsqp.trusted.tap import Taps
from tsqp.trusted.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tsqp.api.links import Link
    from tsqp.api.pads import Filling
    from tsqp.api.supervisor import Supervisor
    from tsqp.checkpoint.base import Checkpoint
    from tsqp.config.model import ModelConfig
    from tsqp.trusted.engine.engine import Engine
    from tsqp.trusted.engine.limits import Limits
    from tsqp.trusted.private import Guard
    from tsqp.trusted.remote.connection import Connection

LAST_PASS_S = 10.0  # longer than a step; a pass over a long prompt may take more, and loses its line


class OpenModel:
    """What ``run`` asks for, opened. For the other arguments, and what is raised, see ``LLM``.

    ``plan``: what was asked for, with the dtypes of this checkpoint. ``place``: where the checkpoint is, on this
    machine. ``engine``: what runs requests, and single forward passes for benchmarks. ``read_line``: what was read
    here, for a person.
    """

    def __init__(
        self,
        run: RunConfig,
        connect: Connect,
        announce: Callable[[Plan], None] | None,
        pads_progress: Callable[[Filling], None] | None,
        progress: Progress,
        limits: Limits | None,
        taps: bool,
    ) -> None:
        self._closed = False
        self.stats = Stats()
        self.plan = Plan.of(run)
        self._channels = Channels(self.plan, connect, taps=taps)
        if announce is not None:
            announce(self.plan)
        _protect_memory(self.plan)
        with ExitStack() as stack:
            self.place = locate(run.model)
            self.plan = Plan.of(run, stored_dtype(self.place))
            self._adapters = _checked_adapters(self.plan, self.place)
            places = worker_places(self.plan, self.place, self._channels)
            self._started = next((place for place in places if isinstance(place, StartedHere)), None)
            for place in places:
                stack.callback(place.close)
                place.prepare()
            progress("loading libraries")
            _prepare_torch(run.compute)
            checkpoint, timings = open_checkpoint(self.place), Timings(progress)
            if checkpoint.left_out:
                text = f"{run.model}: only what is for text is read, not {', '.join(checkpoint.left_out)}"
                warnings.warn(text, TsqpWarning, stacklevel=3)  # of whoever makes the LLM
            timings("reading the tokenizer")
            self.tokenizer = Tokenizer(checkpoint.text_format())
            self.engine, self._workers = self._build_engine(checkpoint, places, stack, limits, timings)
            timings.end()
            reading_s = sum(seconds for what, seconds in timings.seconds.items() if what.startswith("reading"))
            self.read_line = read_line(checkpoint, reading_s)
            self._adapters = self._adapters.without_numbers()
            self._begin_pads(pads_progress)
            stack.callback(self.engine.forget)
            self._resources = stack.pop_all()

    def _build_engine(
        self, checkpoint: Checkpoint, places: Sequence[Place], stack: ExitStack, limits: Limits | None, told: Progress
    ) -> tuple[Engine, Supervisor | None]:
        """The engine, and who watches over its workers; ``stack`` closes them, and what they are made of."""
        from tsqp.api.assemble import build_local_engine
        from tsqp.api.links import SplitLinks
        from tsqp.api.private_links import PrivateLinks
        from tsqp.api.supervisor import Supervisor

        plan, stats, adapters = self.plan, self.stats, self._adapters
        ends, channels = self.tokenizer.eos_token_ids, self._channels
        if plan.partition is None:
            return build_local_engine(checkpoint, plan, ends, stats, stack, limits, told, adapters), None
        links: PrivateLinks | SplitLinks
        dealers: RosterPlace | None = None
        if plan.protection.checked:
            dial, dealers = dialling_dealers(channels, checkpoint.config, places)
            shards = places[0].shards() if isinstance(places[0], RosterPlace) else ()
            links = PrivateLinks(checkpoint, plan, dial, stats, told, adapters, shards)
            stack.callback(give_back_freed_memory)  # last, when nobody has pads any more
            stack.callback(links.close)
        else:
            links = SplitLinks(checkpoint, plan, plan.partition, stats, told, adapters)
        workers = Supervisor(places, links, plan.run.worker.patience_s, dealers=dealers)
        stack.callback(workers.close)
        if channels.taps is not None:
            channels.taps.checks = workers.products_checked
        return links.engine(workers.open(told).decoder, ends, limits, workers), workers

    def _begin_pads(self, progress: Callable[[Filling], None] | None) -> None:
        """Fill the pool first, where that is asked for; then a thread makes more. Nothing where pads have no pool."""
        filler = None if self.guard is None else self.guard.filler
        if filler is None:
            return
        if self.plan.run.guard.warm_pads:
            from tsqp.api.pads import fill

            fill(filler, self.config, progress)
        filler.start()

    @property
    def config(self) -> ModelConfig:
        """The shape of the model."""
        return self.engine.config

    @property
    def most_promised(self) -> int | None:
        """Tokens whose pads can be promised at once, with ``guard.pads_empty`` refuse; None where none are promised."""
        return self.engine.most_promised

    @property
    def adapters(self) -> Mapping[str, str]:
        """The SHA-256 of each adapter that requests may have, by its name."""
        return self._adapters.digests

    def run_digest(self, model_digest: str) -> str:
        """A digest of the model and of the adapters that requests may have: the model's own where there are none."""
        return self._adapters.run_digest(model_digest)

    @property
    def session(self) -> Connection | None:
        """The connection to the worker, or to several; None at ``local``, and while there is no worker."""
        link = self._link
        return None if link is None else link.session

    @property
    def guard(self) -> Guard | None:
        """What checks products, and the pads; None where nothing is checked, and while there is no worker."""
        link = self._link
        return None if link is None else link.guard

    @property
    def _link(self) -> Link | None:
        return None if self._workers is None else self._workers.link

    @property
    def worker_state(self) -> WorkerState | None:
        """Whether there is a worker, how often it was lost, and who was expelled; None at ``local``."""
        return None if self._workers is None else self._workers.state()

    def readmit(self, worker: str) -> None:
        """Ask a worker again that was expelled, by its name in ``worker_state``: for who knows that it is well."""
        if self._workers is not None:
            self._workers.readmit(worker)

    def stop_waiting(self) -> None:
        """Whoever waits for a worker waits no longer, and there is to be no other; any thread may call it."""
        if self._workers is not None:
            self._workers.stop()

    @property
    def dealer(self) -> Dealer | DealerRoster | None:
        """Who makes the pads' products; None where this process does, or there are none."""
        return self._channels.dealer

    @property
    def taps(self) -> Taps | None:
        """Makes a tap for a request; None where no request may have one."""
        return self._channels.taps

    @property
    def worker_pid(self) -> int | None:
        """The process id of the worker started here."""
        return None if self._started is None else self._started.pid

    def explained(self, error: ChannelError) -> ChannelError:
        """The error, or a better one where more is known of the worker."""
        return error if self._workers is None else self._workers.explained(error)

    def ping(self) -> None:
        """One round trip to the worker, once no pass is under way; nothing where there is no worker to be.

        Raises any ChannelError, also while a lost worker is waited for.
        """
        if self._workers is not None:
            self.engine.between_passes(self._ping_link)

    def silent_s(self) -> float:
        """Seconds since the worker's last sign of life: a reply, or the end of a pass. 0 where there is no worker."""
        return 0.0 if self._workers is None else time.perf_counter() - self.stats.heard_s

    def _ping_link(self) -> None:
        session = self.session
        if session is None:
            raise WorkerLost("is lost, and another one is waited for")
        session.ping()

    def close(self) -> None:
        """Leave the worker, and stop it if it was started here. What is under way ends. Closing twice is allowed.

        Passes that are under way or asked for in other threads are waited for, ``LAST_PASS_S`` at most: they use what
        is closed here. Not to be called within a pass, as by a signal handler: it would wait for itself as long.
        """
        self._closed = True
        self.stop_waiting()
        try:
            with self.engine.without_passes(LAST_PASS_S):
                self._resources.close()
        finally:
            self._resources.close()  # after an interrupt too

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _protect_memory(plan: Plan) -> None:
    """Keep what this process has in memory from others, and warn where that cannot be had. Raises OptionError."""
    if plan.protection.checked and not harden_process().undumpable:
        text = "the memory of this process can be read by its user: PR_SET_DUMPABLE failed"
        warnings.warn(text, TsqpWarning, stacklevel=4)  # of whoever makes the LLM
    if plan.run.compute.lock_memory:
        lock_memory()  # before there is anything to keep
    elif plan.protection.checked and swap_bytes():
        text = "swap is on, and the memory of this process may be written there: add compute.lock_memory, or encrypt"
        warnings.warn(f"{text} the swap", TsqpWarning, stacklevel=4)


def _checked_adapters(plan: Plan, model: str) -> LoadedAdapters:
    """The adapters of a run. Raises what only torch can tell of it, and has to be told before a worker is started."""
    run = plan.run
    if run.guard.pads_empty == "refuse":
        from tsqp.api.pads import check_pool

        _prepare_torch(run.compute)
        check_pool(open_checkpoint(model).config, run.guard)
    if not run.compute.lora:
        return NO_ADAPTERS
    _prepare_torch(run.compute)
    return load_adapters(run.compute.lora, open_checkpoint(model).config)


def _prepare_torch(compute: ComputeConfig) -> None:
    """Load torch, which takes a second or two: only now, so that a worker started before does it meanwhile."""
    import torch

    if compute.compiled_kernels:
        keep_loops(compute.kernel_cache)
    torch.set_num_threads(compute.threads or cores())
