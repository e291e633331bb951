"""A Circuit ORAM over the rows of a table that is only read. docs/adr/0029-oblivious-embedding.md.

Whoever watches sees for each access one path of a tree, drawn at random, and two more in a fixed order: nothing of
which row was asked for. The map of positions and the stash are gone through as a whole.

Covers: rows and their bits, also after an access that was interrupted, and that a leaf is drawn anew for each access
(tests/model/test_oram.py). Does not cover: how many rows are asked for; a host that sees whether a line of encrypted
memory was written with what was there before.
Assumes: the operating system's entropy; a stash of ``STASH`` rows does not overflow, and an access fails if it does.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsqp.model.oram_loops import access, new_position, put_back

STASH = 48
PER_NODE = 2
EVICTIONS = 2  # after each access


class Oram:
    """Rows of ``words`` int64 (N, W), by number, once all of them were put in."""

    def __init__(self, words: NDArray[np.int64]) -> None:
        count, width = words.shape
        self.depth = depth_of(count)
        slots = slots_of(count)
        self._ids = np.full(slots, -1, np.int64)
        self._leaves = np.zeros(slots, np.int64)
        self._words = np.zeros((slots, width), np.int64)
        self._positions = np.zeros(count, np.int32)
        self._row, self._held = np.zeros(width, np.int64), np.zeros(width, np.int64)
        self._room = np.zeros((8, max(self.depth + 2, STASH)), np.int64)
        self._turn = 0
        self._source, self._put = words, 0  # rows that are in

    @property
    def filled(self) -> bool:
        """Whether all rows are in."""
        return self._put == len(self._source)

    def fill(self, most: int | None = None) -> None:
        """Put in the next rows, at most so many. Raises OverflowError, with a probability that can be neglected.

        Each row is put in as an access puts it back: were it laid down at its place, a watcher would know the place.
        """
        end = len(self._source) if most is None else min(self._put + most, len(self._source))
        for token in range(self._put, end):
            leaf = self._drawn()
            new_position(self._positions, token, leaf)
            self._row[:] = self._source[token]
            _refuse_overflow(put_back(*self._memory, token, leaf, *self._around()))
            self._put = token + 1

    def row(self, token: int) -> NDArray[np.int64]:
        """A copy of one row (W,). Raises OverflowError, with a probability that can be neglected.

        Raises LookupError for a row that is not in: never what is no row.
        """
        fresh = self._drawn()
        found, fitted = access(*self._memory, self._positions, token, fresh, *self._around())
        _refuse_overflow(fitted)
        if not found:
            raise LookupError("a row of the oblivious memory is not where it was put")
        return self._row.copy()

    def waiting(self) -> int:
        """Rows in the stash."""
        return int((self._ids[:STASH] >= 0).sum())

    @property
    def _memory(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        return self._ids, self._leaves, self._words

    def _around(self) -> tuple[Any, ...]:
        """The paths of the next evictions, sizes, and room to work in."""
        turns = range(self._turn, self._turn + EVICTIONS)
        paths = np.array([_reversed(turn % (1 << self.depth), self.depth) for turn in turns], np.int64)
        self._turn = turns.stop % (1 << self.depth)
        return paths, self.depth, STASH, PER_NODE, self._row, self._held, self._room

    def _drawn(self) -> int:
        return int.from_bytes(os.urandom(8), "little") >> (64 - self.depth)


def _refuse_overflow(fitted: bool) -> None:
    if not fitted:
        raise OverflowError("the stash of the oblivious memory is full")


def depth_of(count: int) -> int:
    """Edges from the root of the tree of so many rows to a leaf."""
    return max(1, (count - 1).bit_length() - 1)


def slots_of(count: int) -> int:
    """Rows that the memory of so many rows has room for."""
    return STASH + ((2 << depth_of(count)) - 1) * PER_NODE


def _reversed(number: int, bits: int) -> int:
    """The bits of a number in the other order: paths in this order share as little as can be."""
    return int(format(number, f"0{bits}b")[::-1], 2)
