"""The embedding in memory accesses that no token id changes. docs/adr/0029-oblivious-embedding.md.

Covers: the rows of the table that are touched, and in what order (tests/model/test_oblivious_embedding.py). Does not
cover: how many tokens there are. Assumes: a processor whose loads and ``and`` take no time that depends on values.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from tsqp.arith.row_threads import row_threads
from tsqp.model.local import LocalEmbedding
from tsqp.model.meter import Meter
from tsqp.model.oblivious_loops import BLOCK, scan_rows
from tsqp.model.operators import Embedding
from tsqp.model.oram import Oram, slots_of
from tsqp.model.pending import Deferred, Pending

log = logging.getLogger("tsqp.embedding")

Way = Literal["auto", "scan", "oram"]

SHARE = 0.25  # of one core, for building a tree beside the work
PIECE = 32  # rows that are put into it at a time: some 20 ms
TOGETHER = 16  # tokens in one pass over the table: their rows stay in the processor's cache


class ScannedEmbedding:
    """Rows of ``table`` (vocab_size, hidden_size), in ``dtype``, each found by a pass over the whole table."""

    def __init__(self, table: torch.Tensor, meter: Meter, dtype: torch.dtype | None = None) -> None:
        self._table = table.contiguous()
        self._meter = meter
        self._dtype = dtype or table.dtype
        row_bytes = table.shape[1] * table.element_size()
        word = next(size for size in (8, 4, 2, 1) if row_bytes % size == 0)
        self._words = self._table.view(torch.uint8).numpy().view(np.dtype(f"u{word}"))

    def start(self, tokens: torch.Tensor) -> Pending:
        """See ``Embedding.start``."""

        def look_up() -> torch.Tensor:
            with self._meter.product("embedding"):
                return self._rows(tokens.to(torch.int64).numpy()).to(self._dtype)

        return Deferred(look_up)

    def _rows(self, tokens: np.ndarray[tuple[int], np.dtype[np.int64]]) -> torch.Tensor:
        """(n, hidden_size), of the table's dtype."""
        threads, words = row_threads(), self._words
        found = np.zeros((len(tokens), words.shape[1]), words.dtype)
        for first in range(0, len(tokens), TOGETHER):
            some = tokens[first : first + TOGETHER]
            parts = np.zeros((threads.threads, len(some), words.shape[1]), words.dtype)
            masks = np.empty((threads.threads, len(some), BLOCK), words.dtype)
            threads.run(scan_rows, len(parts), words, some, masks, parts, least=1)
            np.bitwise_or.reduce(parts, axis=0, out=found[first : first + TOGETHER])
        rows = torch.from_numpy(found.view(np.uint8)).view(self._table.dtype)
        return rows.view(len(tokens), self._table.shape[1])


class OramEmbedding:
    """The same, each row found by paths through a tree. Building it takes an access for each row of the table."""

    def __init__(self, table: torch.Tensor, meter: Meter, dtype: torch.dtype | None = None) -> None:
        self._meter = meter
        self._stored, self._dtype = table.dtype, dtype or table.dtype
        self._row_bytes = table.shape[1] * table.element_size()
        self.oram = Oram(_words(table))

    def start(self, tokens: torch.Tensor) -> Pending:
        """See ``Embedding.start``."""

        def look_up() -> torch.Tensor:
            with self._meter.product("embedding"):
                rows = np.stack([self.oram.row(token) for token in tokens.tolist()]).view(np.uint8)
                kept = np.ascontiguousarray(rows[:, : self._row_bytes])
                return torch.from_numpy(kept).view(self._stored).to(self._dtype)

        return Deferred(look_up)


class GrowingEmbedding:
    """Rows by passes over the whole table until a tree is built, by paths through it from then on: the same bits.

    A thread builds the tree, in ``share`` of its time, until it is done, ``close`` is called or this object is gone.
    Whoever watches sees when the tree is ready, which no token changes.
    """

    def __init__(
        self, table: torch.Tensor, meter: Meter, dtype: torch.dtype | None = None, *, share: float = SHARE
    ) -> None:
        self._now: ScannedEmbedding | OramEmbedding = ScannedEmbedding(table, meter, dtype)
        tree = OramEmbedding(table, meter, dtype)
        tree.oram.fill(1)  # compiles the loops
        tree.oram.row(0)
        self._stop = threading.Event()
        arguments = tree, weakref.ref(self), self._stop, share
        self._thread = threading.Thread(target=_build, args=arguments, name="tsqp-embedding", daemon=True)
        self._thread.start()

    def start(self, tokens: torch.Tensor) -> Pending:
        """See ``Embedding.start``."""
        return self._now.start(tokens)

    def close(self) -> None:
        """Build no further. Closing twice is allowed."""
        self._stop.set()
        self._thread.join()

    def use(self, tree: OramEmbedding) -> None:
        """Find rows by a tree that is built."""
        self._now = tree


def _build(tree: OramEmbedding, user: weakref.ref[GrowingEmbedding], stop: threading.Event, share: float) -> None:
    """Build a tree for as long as there is somebody to use it."""
    while not tree.oram.filled:
        if user() is None or stop.is_set():
            return
        began = time.perf_counter()
        try:
            tree.oram.fill(PIECE)
        except OverflowError as error:  # passes over the table go on
            log.warning("the tree of the embedding could not be built: %s", error)
            return
        stop.wait((time.perf_counter() - began) * (1 / share - 1))
    embedding = user()
    if embedding is not None:
        embedding.use(tree)


def _words(table: torch.Tensor) -> NDArray[np.int64]:
    """The rows of a table as int64 (N, W), with zeros at their ends."""
    octets = table.contiguous().view(torch.uint8).numpy()
    if octets.shape[1] % 8:
        octets = np.pad(octets, ((0, 0), (0, -octets.shape[1] % 8)))
    return octets.view(np.int64)


def tree_bytes(table: torch.Tensor) -> int:
    """Memory that a tree of a table takes beside the table."""
    return slots_of(len(table)) * -(-table.shape[1] * table.element_size() // 8) * 8


def embedding_here(
    table: torch.Tensor,
    meter: Meter,
    dtype: torch.dtype | None = None,
    *,
    oblivious: bool,
    way: Way = "scan",
    room: int | None = None,
) -> Embedding:
    """The embedding of this process; ``way``: how an oblivious one finds its rows.

    ``auto`` is a tree that is built beside the work, where a quarter of ``room``, bytes, is enough for it.
    """
    if not oblivious:
        return LocalEmbedding(table, meter, dtype)
    if way == "auto" and 4 * tree_bytes(table) <= (room or 0):
        return GrowingEmbedding(table, meter, dtype)
    if way == "oram":
        embedding = OramEmbedding(table, meter, dtype)
        embedding.oram.fill()
        return embedding
    return ScannedEmbedding(table, meter, dtype)
