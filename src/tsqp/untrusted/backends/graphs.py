"""Products of few rows as CUDA graphs: one launch instead of one for each kernel.

A graph is bound to its memory. So each has an input and an output that stay, for a number of rows rounded up to a
power of two; a call's rows are copied there and back. Further rows hold whatever an earlier call left. Nothing of
them gets out: row i of a product depends on row i of its input alone, and a call's own rows are what is copied back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakSet

import torch

from tsqp.untrusted.backends.base import Bind, Key
from tsqp.untrusted.backends.driver import Driver, Graph, Pool, Stream

MOST_GRAPHS = 4096  # a model has one for each group, layer and bucket: 32 layers have 645

log = logging.getLogger("tsqp.worker")


@dataclass(frozen=True)
class Captured:
    """A graph, and the device memory of its input and output, uint8 (n,): row after row."""

    graph: Graph
    x: torch.Tensor
    y: torch.Tensor


class Graphs:
    """One for each key and bucket. All share inputs and outputs, and what they work in: no two run at the same time."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._memory: dict[tuple[str, int], torch.Tensor] = {}
        self._captured: dict[Key, Captured] = {}
        self._refused = False
        self._living: WeakSet[Graph] = WeakSet()
        self._pool: Pool | None = None  # of all graphs that live

    def of(
        self,
        key: Key,
        rows: int,
        x: tuple[torch.dtype, int],
        y: tuple[torch.dtype, int],
        bind: Bind,
    ) -> Captured | None:
        """The graph of a product, for these many rows or more; x and y are dtype and columns. None without graphs."""
        rows = bucket(rows)
        whole = (*key, rows, x, y)
        found = self._captured.get(whole)
        if found is None and not self._refused and len(self._captured) < MOST_GRAPHS:
            source, target = self._kept("x", rows, *x), self._kept("y", rows, *y)
            graph = self.capture(bind(source.view(x[0]).view(rows, -1), target.view(y[0]).view(rows, -1)))
            if graph is not None:
                found = self._captured[whole] = Captured(graph, source, target)
        return found

    def capture(self, work: Callable[[], object]) -> Graph | None:
        """Work on memory that stays, captured; None where that was refused once, which is said then.

        Raises torch.OutOfMemoryError: that is no reason to do without.
        """
        if self._refused:
            return None
        other = next(iter(self._living), None)  # held while its pool gets another graph: with the last one it ends
        if other is None or self._pool is None:
            self._pool = self._driver.new_pool()
        try:
            graph = self._driver.capture(work, self._pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._refused = True
            why = str(error).splitlines() or [type(error).__name__]
            log.warning("CUDA graphs are not used (%s): products of few rows are slower", why[0][:200])
            return None
        self._living.add(graph)
        return graph

    def _kept(self, name: str, rows: int, dtype: torch.dtype, columns: int) -> torch.Tensor:
        size = rows * columns * dtype.itemsize
        memory = self._memory.get((name, size))
        if memory is None:
            memory = self._memory[name, size] = self._driver.empty(size, Stream.COMPUTE)
        return memory


def bucket(rows: int) -> int:
    """The next power of two, for at least one row."""
    return 1 << (rows - 1).bit_length()
