"""Connections to the workers of a team, several at a time: ``docs/cluster.md`` §3.

Covers: however many workers do not answer, an attempt ends in time, and soon after it was told to stop; what was opened
is closed where no team comes of it (tests/api/test_dialling.py). Does not cover: a connection that is being made goes
on by itself until it is there or has failed, and is closed then. Assumes: nothing of a worker.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from tsqp.api.places import Dialled
from tsqp.api.until import Until
from tsqp.config.shard import Shard
from tsqp.errors import TsqpError, WorkerUnreachable
from tsqp.wire.channel import Channel
from tsqp.wire.roster import Member
from tsqp.wire.transport.base import Deadline

GRACE_S = 1.0  # for further replicas, once there is a team
LOOK_S = 0.1  # how often to look whether this is to stop
_MOST_AT_ONCE = 32  # connections that are made at the same time

Team = dict[Shard, list[Member]]  # of each shard, in order, those who may be dialled


class Dialling:
    """One attempt to reach a team: of each shard ``replicas`` at a time, until one of them is there."""

    def __init__(self, dial: Callable[[Member], Channel], team: Team, replicas: int, until: Until) -> None:
        self._dial, self._replicas, self._until = dial, replicas, until
        self._waiting = {shard: list(members) for shard, members in team.items()}
        self._errors: dict[Shard, TsqpError | OSError] = {}  # the last one for each shard
        self._reached: dict[Shard, dict[Member, Channel]] = {shard: {} for shard in team}
        self._team = team

    def channels(self) -> list[Dialled]:
        """A channel for each shard at least, shard by shard.

        Raises WorkerUnreachable, and ChannelClosed soon after it was to stop, with all channels closed.
        """
        try:
            while missing := [shard for shard, reached in self._reached.items() if not reached]:
                self._until.raise_if_stopped()
                if self._until.passed:
                    raise self._unreachable(missing[0])
                self._round(missing)
        except BaseException:
            for reached in self._reached.values():
                for channel in reached.values():
                    channel.close()
            raise
        dialled = [
            Dialled(self._reached[shard][member], shard, member.name)
            for shard, members in self._team.items()
            for member in members
            if member in self._reached[shard]
        ]
        return dialled if len(dialled) > 1 else [dialled[0]._replace(shard=None)]  # one that holds all: no team

    def _round(self, missing: Collection[Shard]) -> None:
        """Dial the next ones of these shards, all at once."""
        asked: dict[Future[Channel], tuple[Shard, Member]] = {}
        threads = ThreadPoolExecutor(_MOST_AT_ONCE, thread_name_prefix="tsqp-dial")
        try:
            for shard in missing:
                if not self._waiting[shard]:
                    raise self._unreachable(shard)
                for member in self._waiting[shard][: self._replicas]:
                    asked[threads.submit(self._dial, member)] = shard, member
                del self._waiting[shard][: self._replicas]
            self._collect(asked, missing)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for late in asked:  # those that nobody waits for any longer, or that an interrupt has left
                late.add_done_callback(_close_late)

    def _collect(self, asked: dict[Future[Channel], tuple[Shard, Member]], missing: Collection[Shard]) -> None:
        """Until all are there, or some while there is a team. What is taken is taken out of ``asked``."""
        grace: Deadline | None = None  # from the moment on when there is a team
        while asked:
            if grace is None and all(self._reached[shard] for shard in missing):
                grace = Deadline(GRACE_S)
            left_s = min(LOOK_S, self._until.left_s(LOOK_S), LOOK_S if grace is None else grace.remaining_s)
            done, _ = wait(asked, left_s, FIRST_COMPLETED)
            self._until.raise_if_stopped()
            if not done and (self._until.passed or (grace is not None and grace.passed)):
                return
            for future in done:
                shard, member = asked.pop(future)
                try:
                    self._reached[shard][member] = future.result()
                except (TsqpError, OSError) as error:
                    self._errors[shard] = error

    def _unreachable(self, shard: Shard) -> WorkerUnreachable:
        why = self._errors.get(shard, "none of them has answered in time")
        return WorkerUnreachable(f"no worker that holds {shard} can be reached: {why}")


def _close_late(future: Future[Channel]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().close()
