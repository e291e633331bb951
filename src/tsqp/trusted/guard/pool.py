"""The pool of pads: blocks made ahead of time and handed out once.

Covers: rows are handed out in order and once, also to several threads, and never again after an exception
(test_pads.py); products are checked before they are used (test_dealer.py). A call never waits
for blocks that are made ahead: what is missing it makes itself. When and how many are made ahead is not decided here
but in ``trusted/filler.py``, which never sees a pad.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from tsqp.arith.expand import BLOCK_ROWS, KEY_BYTES, AesKeyStream, expand
from tsqp.arith.field import Array
from tsqp.arith.secret_memory import secret_array, secret_copy
from tsqp.config.groups import GroupKey
from tsqp.errors import MORE_PADS, ChannelClosed, PadsExhausted, TsqpError
from tsqp.trusted.guard.kernels import ERASED
from tsqp.trusted.guard.pads import PadBlock, Ratchet, wipe
from tsqp.trusted.guard.sources import PadSource
from tsqp.trusted.guard.weights import Groups, GuardedGroup

MAKE_BLOCKS = 16  # multiplied together: enough rows for a product to be efficient
_NO_PADS = np.empty((BLOCK_ROWS, 0), np.uint32)


class PadSlice(NamedTuple):
    """``rows`` rows of a call from ``first`` on, masked by those of ``block`` from ``at`` on, if there is one."""

    block: PadBlock | None
    at: int
    first: int
    rows: int

    def pads(self, width: int, room: Array | None = None) -> Array:
        """uint32 (rows, K = ``width``), to be used and erased; (16, 0) where nothing is masked."""
        return _NO_PADS if self.block is None else self.block.pads(self.at, self.rows, width, room)

    def products(self) -> Array:
        """uint32 (rows, N), to be used and erased; (16, 0) where nothing is masked."""
        return _NO_PADS if self.block is None else self.block.products(self.at, self.rows)


def together(slices: Sequence[PadSlice], rows: int) -> list[list[PadSlice]]:
    """Slices whose pads are to lie together: whole blocks that begin within ``rows`` rows; others by themselves."""
    parts = groupby(slices, lambda one: (one.first - slices[0].first) // rows if one.rows == BLOCK_ROWS else ~one.first)
    return [list(part) for _, part in parts]


def pads_together(part: Sequence[PadSlice], width: int) -> Array:
    """Pads of slices that are ``together``, uint32 (rows, K = ``width``); (16, 0) where nothing is masked."""
    if len(part) == 1 or part[0].block is None:
        return part[0].pads(width)
    room = secret_array((len(part), BLOCK_ROWS, width))
    for one, own in zip(part, room, strict=True):
        one.pads(width, own)
    return room.reshape(-1, width)


class NoPads:
    """What ``verified`` has in place of a pool: slices as long as blocks of pads, without pads."""

    def take(self, key: GroupKey, rows: int) -> list[PadSlice]:
        return [PadSlice(None, 0, at, min(BLOCK_ROWS, rows - at)) for at in range(0, rows, BLOCK_ROWS)]

    def supply(self, key: GroupKey, slices: Sequence[PadSlice]) -> None:
        """There is nothing to make."""

    def close(self) -> None:
        """There is nothing to destroy."""


class PadPool:
    """Pads of one connection. ``wait``: a call may make what is missing; otherwise it raises PadsExhausted."""

    def __init__(self, groups: Groups, source: PadSource, *, wait: bool) -> None:
        self.used = self.missed = 0  # rows handed out, of all groups; those whose products had to be made on the spot
        self.recent: dict[GroupKey, tuple[float, int]] = {}  # of each group's last call: when, and its rows
        self.failures: list[TsqpError] = []  # to make pads, in any thread: the first has ended it
        self.keys = tuple(groups)
        self._groups, self._source, self._wait = groups, source, wait
        self._ratchet = Ratchet(os.urandom(KEY_BYTES))
        self._stocks = {key: deque[PadBlock]() for key in groups}  # the first of each may be used in part
        self._blocks = weakref.WeakSet[PadBlock]()  # all there are, also those that calls under way have
        self._lock = threading.Lock()

    def take(self, key: GroupKey, rows: int) -> list[PadSlice]:
        """Pads for ``rows`` rows of one call, which are then the caller's, to use once or lose.

        Raises PadsExhausted; PadReused in a forked process and after ``close``; the first of ``failures``.
        """
        if self.failures:
            raise self.failures[0]
        self._ratchet.refuse()  # before the lock: in a forked process nobody may be left to release it
        with self._lock:
            stock = self._stocks[key]
            # Most calls of an answer find enough in the first block, and need not count the others.
            missing = 0 if stock and stock[0].supplied and stock[0].left >= rows else max(0, rows - self.ready(key))
            if missing and not self._wait:
                raise PadsExhausted(f"{missing} of {rows} pads missing: use {', '.join(MORE_PADS)}", fields=MORE_PADS)
            self.recent[key] = time.monotonic(), rows
            self.used += rows
            self.missed += missing
            slices, first = [], 0
            while first < rows:
                if not stock:
                    stock.append(self._new_block())
                block = stock[0]
                count = min(rows - first, block.left)
                slices.append(PadSlice(block, block.claim(count), first, count))
                first += count
                if not block.left:
                    stock.popleft()
            return slices

    def supply(self, key: GroupKey, slices: Sequence[PadSlice]) -> None:
        """Make the products that are missing. Raises CheckFailed and any error of the source."""
        missing = [one.block for one in slices if one.block is not None and not one.block.supplied]
        for first in range(0, len(missing), MAKE_BLOCKS):
            self._make(self._groups[key], missing[first : first + MAKE_BLOCKS])

    def make(self, key: GroupKey, count: int) -> None:
        """Make ``count`` blocks ahead of time. Raises as ``supply`` and ``take``."""
        self._ratchet.refuse()
        with self._lock:
            blocks = [self._new_block() for _ in range(count)]
        self._make(self._groups[key], blocks)
        with self._lock:
            self._stocks[key].extend(blocks)
        if self._ratchet.destroyed:
            self.close()

    def ready(self, key: GroupKey) -> int:
        """Rows of one group whose products are there."""
        stock = list(self._stocks[key])  # all but the first are whole, and came with their products
        return sum(block.left for block in stock[:1] if block.supplied) + BLOCK_ROWS * len(stock[1:])

    def close(self) -> None:
        """Destroy all pads; in a forked process they are left to the one that made them. Closing twice is allowed."""
        if os.getpid() != self._ratchet.process:
            return
        with self._lock:
            self._ratchet.destroy()
            for block in list(self._blocks):
                block.destroy()
            for stock in self._stocks.values():
                stock.clear()

    def _new_block(self) -> PadBlock:
        self._blocks.add(block := PadBlock(self._ratchet.next_key()))
        return block

    def _make(self, group: GuardedGroup, blocks: Sequence[PadBlock]) -> None:
        """Give blocks their products, checked; or destroy them. After a failure nobody is asked again."""
        if self.failures:
            raise self.failures[0]
        keys, parts = list[bytearray](), [slice(i * BLOCK_ROWS, (i + 1) * BLOCK_ROWS) for i in range(len(blocks))]
        # Of one size for all calls, so that it is used again.
        most = secret_array((max(MAKE_BLOCKS, len(blocks)) * BLOCK_ROWS, group.in_features))
        unchecked = pads = most[: len(blocks) * BLOCK_ROWS]
        try:
            keys.extend(block.key() for block in blocks)  # those before one that is gone are wiped too
            for key, part in zip(keys, parts, strict=True):
                expand(AesKeyStream(key), pads[part])
            unchecked = self._source.products(group, keys, pads)
            group.check_products(pads, unchecked)
            for block, part in zip(blocks, parts, strict=True):
                block.supply(secret_copy(unchecked[part]))  # so that each block's memory is its own
        except BaseException as error:
            # Each is kept: the session may end with that of either thread, and then it is not about the worker.
            self.failures.append(error if isinstance(error, TsqpError) else ChannelClosed("no pads could be made"))
            for block in blocks:
                block.destroy()
            raise
        finally:
            for key in keys:
                wipe(key)
            for secret in (pads, unchecked):
                secret.fill(ERASED)
