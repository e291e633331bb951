"""Several dealers of pads, of which one makes a request's blocks: ``docs/cluster.md`` §5.

A dealer that is lost costs nothing while another is there: the keys go to that one. All dealers together are assumed
not to be in league with a worker, so it does not matter which of them know a key.

Covers: of a wrong product it is known who made it (tests/trusted/test_dealers.py). Does not cover: a dealer in league
with a worker. Assumes: the pool checks every product before it uses a pad, and asks nobody again after a failure.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from tsqp.arith.field import Array
from tsqp.config.groups import GroupKey
from tsqp.errors import ChannelError, DeadlineExceeded, WorkerFailed, WorkerLost
from tsqp.trusted.guard.pool import PadSlice
from tsqp.trusted.guard.sources import DealerPadSource
from tsqp.trusted.guard.weights import GuardedGroup
from tsqp.trusted.metered import MeteredPool
from tsqp.trusted.remote.session import WorkerSession
from tsqp.trusted.stats import Stats

LOST = (WorkerLost, WorkerFailed, DeadlineExceeded)  # what another dealer makes good

log = logging.getLogger("tsqp.workers")


class _Dealer:
    """A session with one dealer. ``name``: what it is expelled by, empty for one that is the only one."""

    def __init__(self, session: WorkerSession, name: str) -> None:
        self.session = session
        self.name = name
        self.source = DealerPadSource(session)
        self.busy = 0  # requests under way
        self.made = 0  # blocks


class Dealers:
    """See PadSource. Each dealer holds all of the model; the least busy one is asked."""

    def __init__(self, sessions: Sequence[tuple[WorkerSession, str]]) -> None:
        self._dealers = [_Dealer(session, name) for session, name in sessions]
        self._lock = threading.Lock()  # of who is asked: the pool's thread and the run's may both ask
        self._asked = threading.local()  # ``last``: the dealer that a thread has asked
        self._left_nobody: ChannelError | None = None  # the first error after which no dealer was left

    @property
    def ended(self) -> ChannelError | None:
        """What has ended the session with the dealer that was left last; None while there is one."""
        errors = [dealer.session.ended for dealer in self._dealers]
        return None if None in errors else self._left_nobody or errors[-1]

    def ended_by(self, error: Exception) -> bool:
        """Whether it has ended the session with one of them."""
        return any(dealer.session.ended is error for dealer in self._dealers)

    def products(self, group: GuardedGroup, keys: Sequence[bytearray], pads: Array) -> Array:
        """See PadSource. Raises ``ended``, once there is no dealer."""
        while True:
            if (ended := self.ended) is not None:
                raise ended
            with self._lock:
                there = [dealer for dealer in self._dealers if dealer.session.ended is None] or self._dealers[-1:]
                dealer = min(there, key=lambda one: (one.busy, one.made))
                dealer.busy += 1
            self._asked.last = dealer
            try:
                product = dealer.source.products(group, keys, pads)
            except ChannelError as error:
                nobody = self._is_nobody_left(error)
                if nobody or not isinstance(error, LOST):
                    raise
                text = "%s; the other dealers go on"
                log.warning(text, error, extra={"event": "dealer_lost"})
            else:
                dealer.made += len(keys)
                return product
            finally:
                with self._lock:
                    dealer.busy -= 1

    def _is_nobody_left(self, error: ChannelError) -> bool:
        """After an error of one of them, which is remembered if it was the last."""
        with self._lock:
            if self.ended is not None:
                self._left_nobody = self._left_nobody or error
            return self._left_nobody is not None

    @contextmanager
    def named(self) -> Iterator[None]:
        """An error about a product is about the dealer that this thread has asked for it."""
        self._asked.last = None
        try:
            yield
        except ChannelError as error:
            dealer: _Dealer | None = self._asked.last
            if dealer is not None and dealer.name:
                error.of_worker(dealer.name, dealer.session.address)
            raise

    def close(self) -> None:
        """Leave all of them. Closing twice is allowed."""
        with ExitStack() as closing:
            for dealer in self._dealers:
                closing.callback(dealer.session.close)


class DealtPool(MeteredPool):
    """A pool whose blocks dealers make, and whose errors say which one of them it was."""

    def __init__(self, groups: Mapping[GroupKey, GuardedGroup], source: Dealers, stats: Stats, *, wait: bool) -> None:
        super().__init__(groups, source, stats, wait=wait)
        self._dealers = source

    def supply(self, key: GroupKey, slices: Sequence[PadSlice]) -> None:
        with self._dealers.named():
            super().supply(key, slices)

    def make(self, key: GroupKey, count: int) -> None:
        with self._dealers.named():
            super().make(key, count)
