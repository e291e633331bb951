"""Keys and values of one connection on a device: one block of memory in pages, so that its addresses stay.

A sequence has pages of ``PAGE`` positions, anywhere. Page 0 belongs to no sequence: what has no place is written there.
A page is zero when a sequence gets it: a NaN that lies in a place which is masked would still spoil a sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch

from tsqp.config.model import ModelConfig
from tsqp.errors import ProtocolError
from tsqp.model.cache import Positions

PAGE = 64  # positions of a page
FIRST_PAGES = 16  # of a connection that is new


class PagedSequence(Positions):
    """The positions of one sequence: page ``pages[n]`` has those from ``n * PAGE`` on."""

    def __init__(self) -> None:
        super().__init__()
        self.pages: list[int] = []

    def slot(self, position: int) -> int:
        """Where a position is, counted from the beginning of the memory."""
        return self.pages[position // PAGE] * PAGE + position % PAGE

    def slots(self, first: int, end: int) -> torch.Tensor:
        """Where positions from ``first`` to ``end`` are, int64 (end - first,) on the host."""
        pages = torch.tensor(self.pages[first // PAGE : pages_for(end)]).unsqueeze(1)
        skipped = first - first % PAGE
        return (pages * PAGE + torch.arange(PAGE)).flatten()[first - skipped : end - skipped]


class Pages:
    """The memory, (layers, 2, pages, PAGE, kv_heads, head_dim): keys and values. It doubles when it is full.

    ``generation`` counts how often its address has changed.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, max_bytes: int) -> None:
        self._shape = config.num_layers, 2, PAGE, config.num_kv_heads, config.head_dim
        self._dtype, self._device = dtype, device
        self.page_bytes = 2 * config.num_layers * PAGE * config.kv_size * dtype.itemsize
        self._most = max_bytes // self.page_bytes
        self._free: list[int] = []  # the lowest last, so that pages which are taken together are mostly neighbours
        self.memory = self._new(1)
        self.generation = 0

    def reserve(self, sequence: PagedSequence, end: int) -> None:
        """Have pages for positions up to ``end``. Raises ProtocolError over the bound, torch.OutOfMemoryError."""
        missing = pages_for(end) - len(sequence.pages)
        if missing <= 0:
            return
        if missing > len(self._free):
            self._grow(self.memory.shape[2] - 1 + missing - len(self._free))
        new = [self._free.pop() for _ in range(missing)]
        for first, stop in runs(new):
            self.memory[:, :, first:stop].zero_()
        sequence.pages += new

    def release(self, sequence: PagedSequence) -> None:
        """Others may have the pages of a sequence. Releasing twice is allowed."""
        self._free = sorted((*self._free, *sequence.pages), reverse=True)
        sequence.pages = []

    def slots(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, (slots, kv_heads, head_dim) each, not copied."""
        keys, values = self.memory[layer].flatten(1, 2)
        return keys, values

    def view(
        self, layer: int, pages: Sequence[int], index: torch.Tensor, first: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of positions from ``first`` to ``end`` in ``pages``: (kv_heads, end - first, head_dim) each.

        ``index`` has the same pages, int32 on the device. Neighbours are not copied.
        """
        stop = pages[0] + len(pages)
        lies_closely = list(pages) == [*range(pages[0], stop)]
        own = self.memory[layer]
        found = own[:, pages[0] : stop] if lies_closely else own.index_select(1, index)
        keys, values = found.flatten(1, 2)[:, first:end].transpose(1, 2)
        return keys, values

    def _grow(self, needed: int) -> None:
        """Room for ``needed`` pages, or for twice as many as before. Earlier pages keep their numbers."""
        if needed > self._most:
            raise ProtocolError(f"the KV caches need {needed} pages of {PAGE} positions; there may be {self._most}")
        old = self.memory
        held = old.shape[2]
        self.memory = self._new(1 + min(self._most, max(needed, 2 * (held - 1), FIRST_PAGES)))
        self.memory[:, :, :held] = old
        self._free = [*range(self.memory.shape[2] - 1, held - 1, -1), *self._free]
        self.generation += 1

    def _new(self, pages: int) -> torch.Tensor:
        layers, two, *page = self._shape
        return torch.zeros(layers, two, pages, *page, dtype=self._dtype, device=self._device)


def pages_for(positions: int) -> int:
    """How many pages so many positions take."""
    return -(-positions // PAGE)


def runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Numbers as ranges, each from its first to the one after its last: 3, 4, 5, 9 are (3, 6) and (9, 10)."""
    numbers = list(numbers)
    edges = [0, *(n + 1 for n, (one, other) in enumerate(pairwise(numbers)) if other != one + 1), len(numbers)]
    for first, stop in pairwise(edges):
        if first < stop:
            yield numbers[first], numbers[stop - 1] + 1
