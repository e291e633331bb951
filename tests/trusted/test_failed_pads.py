"""What came of making pads is not about the worker, whichever of two threads it ended, and whichever was the first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import pytest
import torch

from tests.trusted.guard.fakes import KEY, OTHER, Array, make_groups, make_pool
from tests.trusted.guard.honest import HonestConnection
from tsqp.errors import ChannelError, PadReused, ProductMismatch, WorkerLost
from tsqp.trusted import dealers as dealing
from tsqp.trusted.dealers import Dealers, DealtPool
from tsqp.trusted.filler import PadFiller
from tsqp.trusted.guard.linears import MaskedLinears
from tsqp.trusted.guard.pool import PadPool
from tsqp.trusted.guard.sources import LocalPadSource
from tsqp.trusted.guard.weights import GuardedGroup
from tsqp.trusted.private import Guard
from tsqp.trusted.stats import Stats

Change = Callable[[Array], None]


class Together(LocalPadSource):
    """Both threads have asked before either is answered. ``of_filler`` and ``of_run`` change the right products."""

    def __init__(self) -> None:
        self.of_filler: Change = lambda products: None
        self.of_run: Change = lambda products: None
        self._both = threading.Barrier(2)

    def products(self, group: GuardedGroup, keys: Sequence[bytearray], pads: Array) -> Array:
        products = super().products(group, keys, pads)
        self._both.wait(20)
        of_filler = threading.current_thread().name == "tsqp-pads"
        (self.of_filler if of_filler else self.of_run)(products)
        return products


def spoil(products: Array) -> None:
    products[0, 0] ^= 1


def assert_soon(event: threading.Event) -> None:
    assert event.wait(20)


@contextmanager
def beside(source: LocalPadSource) -> Iterator[tuple[MaskedLinears, PadFiller]]:
    """A run of one group, and a filler that makes pads of another."""
    groups, weights = make_groups()
    with closing(make_pool(groups, source)) as pool, closing(PadFiller(pool, {OTHER: 1})) as filler:
        yield MaskedLinears(HonestConnection(weights), groups, pool), filler


def ended(linears: MaskedLinears) -> ChannelError:
    """What a call ends the session with that has no pads ready."""
    with pytest.raises(ChannelError) as caught:
        linears.start(KEY, torch.randn(5, 40)).wait()
    return caught.value


def guard_of(linears: MaskedLinears, dealers: Dealers | None = None) -> Guard:
    return Guard(linears, 2, "", None, dealers)


def test_an_honest_product_that_meets_forgotten_vectors_comes_after_the_error_that_counts() -> None:
    source, over = Together(), threading.Event()
    source.of_run, source.of_filler = spoil, lambda products: assert_soon(over)
    with beside(source) as (linears, filler):
        filler.start()
        error = ended(linears)
        over.set()
        filler._thread.join(20)
        first, second = linears.pads.failures
        assert first is error is not second
        assert isinstance(second, ProductMismatch)
        guard = guard_of(linears)
        assert guard.failed_pads(first)
        assert guard.failed_pads(second)
        assert not guard.failed_pads(ProductMismatch("the worker's product is wrong"))


def test_the_run_may_end_with_the_second_of_two_wrong_products() -> None:
    source = Together()
    with beside(source) as (linears, filler):
        source.of_filler = spoil

        def after_the_filler(products: Array) -> None:
            filler._thread.join(20)
            spoil(products)

        source.of_run = after_the_filler
        filler.start()
        error = ended(linears)
        assert linears.pads.failures[1] is error
        assert filler.failure is linears.pads.failures[0]
        assert guard_of(linears).failed_pads(error)


def test_a_filler_that_wakes_after_the_end_takes_nothing_back() -> None:
    class Wrong(LocalPadSource):
        def products(self, group: GuardedGroup, keys: Sequence[bytearray], pads: Array) -> Array:
            products = super().products(group, keys, pads)
            spoil(products)
            return products

    over = threading.Event()
    with beside(Wrong()) as (linears, filler):
        filler.busy = lambda: not over.wait(20)
        filler.start()
        error = ended(linears)
        over.set()
        filler._thread.join(20)
        assert [type(one) for one in linears.pads.failures] == [ProductMismatch, PadReused]
        assert guard_of(linears).failed_pads(error)
        with pytest.raises(ProductMismatch):  # and every later call hears of the first
            linears.pads.take(KEY, 1)


class FakeSession:
    """``fails``: what the next request ends it with."""

    def __init__(self, name: str) -> None:
        self.address = name
        self.ended: ChannelError | None = None
        self.fails: ChannelError | None = None


class FakeSource(LocalPadSource):
    def __init__(self, session: Any) -> None:
        self._session = session

    def products(self, group: GuardedGroup, keys: Sequence[bytearray], pads: Array) -> Array:
        if self._session.fails is not None:
            self._session.ended = self._session.ended or self._session.fails
            raise self._session.ended
        return super().products(group, keys, pads)


@pytest.mark.parametrize("last", [0, 1])
def test_the_loss_of_the_last_dealer_in_idle_time_is_not_about_the_worker(
    last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dealing, "DealerPadSource", FakeSource)
    sessions: list[Any] = [FakeSession("a"), FakeSession("b")]
    dealers = Dealers([(session, session.address) for session in sessions])
    groups, weights = make_groups()
    pool: PadPool = DealtPool(groups, dealers, Stats(), wait=True)
    linears = MaskedLinears(HonestConnection(weights), groups, pool)
    guard = guard_of(linears, dealers)
    with closing(pool), closing(PadFiller(pool, {OTHER: 40})) as filler:
        sessions[1 - last].fails = WorkerLost("gone long ago")
        filler.fill()  # both are asked
        pool.take(OTHER, 500)
        assert (sessions[1 - last].ended, dealers.ended) == (sessions[1 - last].fails, None)
        sessions[last].fails = WorkerLost("gone now")
        filler.start()  # idle time
        filler._thread.join(20)
        assert dealers.ended is sessions[last].fails
        assert guard.failed_pads(sessions[last].fails)
        assert linears.pads.failures == [sessions[last].fails]
        assert not guard.failed_pads(WorkerLost("the worker went away"))


@pytest.mark.parametrize("which", [0, 1])
def test_what_has_ended_a_dealer_is_known_before_the_pool_has_heard_of_it(which: int) -> None:
    """Another thread may be on its way to say so."""
    sessions: list[Any] = [FakeSession("a"), FakeSession("b")]
    groups, weights = make_groups()
    linears = MaskedLinears(HonestConnection(weights), groups, make_pool(groups))
    guard = guard_of(linears, Dealers([(session, session.address) for session in sessions]))
    for session in sessions:
        session.ended = WorkerLost("gone")
    assert guard.failed_pads(sessions[which].ended)
    assert not linears.pads.failures
