"""Where the guard's time goes. The guard itself counts nothing: its parts are wrapped here."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from tsqp.config.groups import GroupKey
from tsqp.model.local import call_kind
from tsqp.model.meter import CallKind
from tsqp.model.operators import Linears
from tsqp.model.pending import Pending
from tsqp.trusted.guard.pool import PadPool, PadSlice
from tsqp.trusted.guard.sources import PadSource
from tsqp.trusted.guard.weights import GuardedGroup
from tsqp.trusted.stats import Stats


class MeteredPool(PadPool):
    """A pool that counts as ``pads`` the time in which a call makes what is missing."""

    def __init__(self, groups: Mapping[GroupKey, GuardedGroup], source: PadSource, stats: Stats, *, wait: bool) -> None:
        super().__init__(groups, source, wait=wait)
        self._stats = stats

    def supply(self, key: GroupKey, slices: Sequence[PadSlice]) -> None:
        if all(one.block is None or one.block.supplied for one in slices):
            return
        with self._stats.operator("pads"):
            super().supply(key, slices)


class MeteredLinears:
    """The guard's linear layers. What they take apart from the line and missing pads is the guard's own time.

    It counts as ``mask`` up to the sending of a product, as ``check`` after that.
    """

    def __init__(self, linears: Linears, stats: Stats) -> None:
        self._linears = linears
        self._stats = stats

    def input(self, key: GroupKey, rows: int) -> torch.Tensor:
        return self._linears.input(key, rows)

    def start(self, key: GroupKey, x: torch.Tensor) -> Pending:
        kind = call_kind(key)
        start, counted = time.perf_counter(), counted_s(self._stats, kind)
        asked = self._linears.start(key, x)
        elsewhere = counted_s(self._stats, kind) - counted
        self._stats.spent("mask", start, max(start, time.perf_counter() - elsewhere))
        return MeteredProduct(asked, kind, self._stats)


class MeteredProduct:
    """A product under way; see ``Pending``."""

    def __init__(self, asked: Pending, kind: CallKind, stats: Stats) -> None:
        self._asked, self._kind, self._stats = asked, kind, stats
        self.release = asked.release

    def wait(self) -> torch.Tensor:
        start, counted = time.perf_counter(), counted_s(self._stats, self._kind)
        product = self._asked.wait()
        end, elsewhere = time.perf_counter(), counted_s(self._stats, self._kind) - counted
        self._stats.spent("check", min(end, start + elsewhere), end)  # the last thing that is done
        return product


def counted_s(stats: Stats, kind: CallKind) -> float:
    """Time so far that calls of one kind have held this side, or that went into missing pads."""
    return stats.calls[kind].held_s + stats.operator_s.get("pads", 0.0)
