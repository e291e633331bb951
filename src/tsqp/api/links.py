"""A link is one session with a worker and all that is good for this session alone; what outlives it makes the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tsqp.api.adapters import NO_ADAPTERS, LoadedAdapters
from tsqp.api.assemble import Placement, attention_here, build_decoder, kv_memory
from tsqp.api.places import Dialled
from tsqp.api.plan import Plan
from tsqp.api.until import Stopped, Until
from tsqp.checkpoint.base import Checkpoint
from tsqp.config.dtype import numeric_path
from tsqp.config.partition import Partition
from tsqp.errors import ChannelError, ModelMismatch, OptionError
from tsqp.model.decoder_layers import Norms
from tsqp.model.local import LocalEmbedding
from tsqp.progress import Progress, unseen
from tsqp.trusted.engine.engine import Engine
from tsqp.trusted.engine.limits import Limits
from tsqp.trusted.engine.line import Line, PassDecoder
from tsqp.trusted.private import Guard
from tsqp.trusted.remote.attention import OpenAttention
from tsqp.trusted.remote.connection import Connection
from tsqp.trusted.remote.embedding import OpenEmbedding
from tsqp.trusted.remote.layers import LayerDecoder
from tsqp.trusted.remote.linears import OpenLinears
from tsqp.trusted.remote.session import WorkerSession
from tsqp.trusted.stats import Stats
from tsqp.wire.channel import Channel
from tsqp.wire.payload import TORCH_DTYPES

Reach = Callable[[Until], Sequence[Dialled]]


@dataclass(frozen=True)
class Link:
    """``guard`` is None where nothing is checked."""

    decoder: PassDecoder
    session: Connection
    guard: Guard | None = None

    @property
    def ended(self) -> ChannelError | None:
        """What has ended the session with the worker, or with the dealers; None while they go on."""
        dealers = None if self.guard is None else self.guard.dealers
        return self.session.ended or (None if dealers is None else dealers.ended)

    def close(self) -> None:
        """End the sessions and destroy what is secret. Closing twice is allowed."""
        try:
            if self.guard is not None:
                self.guard.close()
        finally:
            self.session.close()


class Links(Protocol):
    """Makes links of one run, one after another. One thread asks at a time."""

    def renew(self, stopped: Stopped) -> None:
        """Make what the next link needs apart from its worker; ``connect`` does it otherwise.

        Raises ChannelClosed soon after ``stopped``.
        """

    def connect(self, dial: Reach, until: Until) -> Link:
        """A link over a new channel.

        Connections and handshakes of a team may take ``until`` then; so long may the handshake of a worker alone take,
        from when it is there, and those of dealers. Where it has no end handshakes may take as long as any call.

        Raises ChannelError and what ``dial`` raises; ChannelClosed soon after it was to stop.
        """

    def resume(self, link: Link, stopped: Stopped) -> None:
        """Make ready what requests that were begun with an earlier link count on; early end where ``stopped``.

        Raises ChannelError.
        """


class SplitLinks:
    """Links of mode ``open``: what the partition names is on the worker, which sees it and is believed.

    This side's weights are read here, so that a worker can load at the same time.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        partition: Partition,
        stats: Stats,
        progress: Progress = unseen,
        adapters: LoadedAdapters = NO_ADAPTERS,
    ) -> None:
        self._checkpoint, self._plan, self._partition, self._stats = checkpoint, plan, partition, stats
        self._names = tuple(adapters.digests)
        self._adapters = adapters.for_layers(checkpoint.config, stats, own_products=False)
        self._fingerprint = checkpoint.fingerprint()
        dtype = TORCH_DTYPES[plan.dtype]
        self._embedding: LocalEmbedding | None = None
        if not partition.remote_embedding:
            progress("reading the embedding")  # the one large tensor here
            table = checkpoint.copy("model.embed_tokens.weight", dtype)
            self._embedding = LocalEmbedding(table, stats)
        self._norms = None if partition.whole_layers else Norms.load(checkpoint, dtype)

    def renew(self, stopped: Stopped) -> None:
        """See Links: there is nothing to make."""

    def connect(self, dial: Reach, until: Until) -> Link:
        """See Links."""
        session = WorkerSession(
            _only(dial(until)),
            self._checkpoint.config,
            self._fingerprint,
            wire_dtype=self._plan.wire_dtype,
            dtype=self._plan.dtype,
            stats=self._stats,
            deadline_s=self._plan.run.worker.deadline_s,
            handshake_s=until.again().left_s(self._plan.run.worker.deadline_s),
            path=numeric_path(self._plan.linear_dtype),
        )
        if self._partition.whole_layers and "," in session.welcome.device:
            session.close()
            raise ModelMismatch(
                f"the worker at {session.address} computes on {session.welcome.device}, and partition layer is "
                "of a worker on one device: use another partition"
            )
        return Link(self._decoder(session), session)

    def resume(self, link: Link, stopped: Stopped) -> None:
        """See Links: there is nothing that they count on."""

    def engine(
        self,
        decoder: PassDecoder,
        eos_token_ids: tuple[int, ...],
        limits: Limits | None = None,
        line: Line | None = None,
    ) -> Engine:
        """An engine that begins with the decoder of a link."""
        memory = None if self._partition.whole_layers else kv_memory(self._plan)
        return Engine(
            decoder,
            eos_token_ids,
            self._stats,
            limits=limits,
            kv_memory=memory,
            line=line,
            adapters=self._names,
            oblivious=self._plan.oblivious,
        )

    def _decoder(self, session: WorkerSession) -> PassDecoder:
        plan, partition = self._plan, self._partition
        if self._norms is None:
            return LayerDecoder(session, max_rows=plan.run.compute.prefill_chunk)
        here = None if partition.remote_attention else attention_here(self._checkpoint, plan, self._stats)
        placement = Placement(
            self._embedding or OpenEmbedding(session),
            OpenLinears(session, split=partition.split_groups),
            here or OpenAttention(session),
        )
        return build_decoder(
            self._checkpoint,
            plan,
            placement,
            self._stats,
            self._norms,
            adapters=self._adapters,
            device=session.welcome.device,
        )


def _only(dialled: Sequence[Dialled]) -> Channel:
    """The channel to the one worker that holds all of a model. Raises OptionError where there are several."""
    if len(dialled) == 1 and dialled[0].shard is None:
        return dialled[0].channel
    for one in dialled:
        one.channel.close()
    raise OptionError("several workers with shards of a model are for protection verified and masked")
