"""Sessions of the private modes: with one worker, with dealers of pads, and with each worker of a team."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from tsqp.api.places import Dialled
from tsqp.api.until import Until
from tsqp.config.groups import GroupName
from tsqp.config.model import ModelConfig
from tsqp.config.shard import Shard, whole
from tsqp.config.tiling import Tiling
from tsqp.errors import ChannelError, ModelMismatch, OptionError
from tsqp.trusted.dealers import Dealers
from tsqp.trusted.private import PrivateModel
from tsqp.trusted.remote.members import Member
from tsqp.trusted.remote.session import WorkerSession
from tsqp.trusted.remote.team import Team
from tsqp.trusted.stats import Stats
from tsqp.wire.channel import Channel
from tsqp.wire.transport.base import Deadline

REPLICA_S = 10.0  # of a handshake with somebody in whose place there are others

log = logging.getLogger("tsqp.workers")


@dataclass(frozen=True)
class PrivateSessions:
    """Opens sessions of one run. Whoever opens one closes it; a channel whose session cannot be had is closed."""

    config: ModelConfig
    fingerprint: str
    deadline_s: float

    def open(
        self,
        channel: Channel,
        stats: Stats,
        digests: Mapping[GroupName, str],
        handshake_s: float | None,
        *,
        role: Literal["worker", "dealer"] = "worker",
        shard: Shard | None = None,
    ) -> WorkerSession:
        """A session on the field path, with who holds the weights of those digests. Raises ChannelError."""
        return WorkerSession(
            channel,
            self.config,
            self.fingerprint,
            wire_dtype="float32",
            dtype="float32",
            stats=stats,
            deadline_s=self.deadline_s,
            handshake_s=handshake_s,
            path="field",
            digests=digests,
            role=role,
            shard=shard,
        )

    def one(self, channel: Channel, stats: Stats, digests: Mapping[GroupName, str], until: Until) -> WorkerSession:
        """A session with one worker that holds all of a model. Raises ChannelError."""
        within_s = until.again().left_s(self.deadline_s)  # one that is started here may have taken long to be there
        return self.open(channel, stats, digests, within_s)

    def team(
        self,
        dialled: Sequence[Dialled],
        model: PrivateModel,
        tiling: Tiling,
        stats: Stats,
        until: Until,
    ) -> Team:
        """A team of those that were dialled. One that cannot be had is done without, if another has its shard.

        All handshakes together take no longer than ``until``, or than a call. One that is silent is waited for no
        longer than ``_Greeting`` says, unless it is the last hope of its shard. ``model`` has the digests of the
        tiling. Raises ChannelError.
        """
        members, lines = list[Member](), Stats()
        waiting = Counter(one.shard or whole(self.config) for one in dialled)
        greeting = _Greeting(len(dialled), until, self.deadline_s)
        with ExitStack() as opened:
            for channel, shard, name in dialled:
                shard, address = shard or whole(self.config), channel.address
                waiting[shard] -= 1
                others = waiting[shard] > 0 or any(member.shard == shard for member in members)
                within_s = greeting.next_s(others)
                try:
                    digests = model.shard_digests.get(shard, model.digests)  # those of the model for who has all of it
                    session = self.open(channel, lines, digests, within_s, shard=shard)
                except ChannelError as error:
                    error.of_worker(name or address, address)
                    if not others:
                        raise
                    text = "%s; its replicas, if it has any, do without it"
                    log.warning(text, error, extra={"event": "replica_refused"})
                else:
                    opened.callback(session.close)
                    members.append(Member(session, shard, name))
            opened.pop_all()
        return Team(members, tiling, stats, self.deadline_s)

    def dealers(self, dialled: Sequence[Dialled], digests: Mapping[GroupName, str], until: Until) -> Dealers:
        """Sessions with those dealers that can be had, in the time that a team has.

        One that is silent is waited for no longer than ``_Greeting`` says while others are left. Raises ChannelError
        where there is none.
        """
        sessions, error = list[tuple[WorkerSession, str]](), ChannelError("no dealer was named", side="dealer")
        greeting = _Greeting(len(dialled), until, self.deadline_s)
        with ExitStack() as opened:
            for one in dialled:
                opened.callback(one.channel.close)
            for number, (channel, _, name) in enumerate(dialled, 1):
                within_s = greeting.next_s(others=bool(sessions) or number < len(dialled))
                try:
                    session = self.open(channel, Stats(), digests, within_s, role="dealer")
                except ChannelError as refused:
                    error = refused
                    if len(dialled) > 1:
                        log.warning("%s; the other dealers do without it", refused, extra={"event": "dealer_refused"})
                else:
                    opened.callback(session.close)
                    sessions.append((session, name))
            if not sessions:
                raise error
            opened.pop_all()
        return Dealers(sessions)


class _Greeting:
    """How long each of several handshakes may take, one after another, in the time there is for all of them."""

    def __init__(self, count: int, until: Until, otherwise_s: float) -> None:
        self._left = count  # to be greeted
        self._until = until
        self._end = Deadline(until.left_s(otherwise_s))

    def next_s(self, others: bool) -> float:
        """Seconds for the next one. Where there are others in its place, it takes no more than its share.

        So nobody who is silent takes the time of those who come after. Raises ChannelClosed where it is to stop.
        """
        self._until.raise_if_stopped()
        share_s = self._end.remaining_s / self._left
        self._left -= 1
        return min(REPLICA_S, share_s) if others else self._end.remaining_s


def tiling_of(dialled: Sequence[Dialled], config: ModelConfig) -> Tiling | None:
    """How those that were dialled divide a model; None for one worker of which nothing is said.

    Raises ModelMismatch where they do not hold it once.
    """
    if len(dialled) == 1 and dialled[0].shard is None:
        return None
    try:
        return Tiling([one.shard or whole(config) for one in dialled], config)
    except OptionError as error:
        raise ModelMismatch(str(error)) from None
