"""The pool of pads: blocks ready ahead of time, made in idle time, handed out once.

Covers: rows are handed out in order and once, also to several threads, and never again after an exception
(tests/guard/test_pads.py); products are checked before they are used (tests/guard/test_dealer.py); memory is bounded
(tests/guard/test_pool.py). A call never waits for the thread that fills the pool: what is missing it makes itself.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tsqp.arith.expand import BLOCK_ROWS, KEY_BYTES, AesKeyStream, expand
from tsqp.errors import PadsExhausted, ProductMismatch, TsqpError
from tsqp.spec.groups import GroupKey
from tsqp.trusted.guard.kernels import ERASED
from tsqp.trusted.guard.pads import PadBlock, Ratchet, refuse_in_fork
from tsqp.trusted.guard.sources import PadSource
from tsqp.trusted.guard.weights import GuardedGroup

Array = np.ndarray[Any, np.dtype[Any]]

HEAD_ROWS = 64  # the LM head needs one row for a token of the answer, none for one of the prompt
MAKE_BLOCKS = 16  # multiplied together: enough rows for a product to be efficient
IDLE_S = 0.05  # without a call for so long, the cores are free


class Piece(NamedTuple):
    """Rows ``first`` to ``end`` of a call, and their pads: rows of ``block`` from ``at`` on."""

    block: PadBlock
    at: int
    first: int
    end: int


@dataclass
class Stock:
    """The blocks of one group: ``ready`` with products; ``current``, which has been handed out in part."""

    group: GuardedGroup
    target: int  # blocks to keep ready
    ready: deque[PadBlock] = field(default_factory=deque)
    current: PadBlock | None = None
    last_rows: int = 0  # of the last call

    @property
    def rows(self) -> int:
        """Rows whose products are there."""
        current = self.current.left if self.current is not None and self.current.supplied else 0
        return len(self.ready) * BLOCK_ROWS + current


class PadPool:
    """Pads of one connection.

    ``ahead``: tokens to keep ready, as far as ``memory`` bytes allow. ``wait``: whether a call may make what is
    missing; otherwise it raises PadsExhausted.
    """

    def __init__(
        self, groups: Mapping[GroupKey, GuardedGroup], source: PadSource, *, ahead: int, memory: int, wait: bool
    ) -> None:
        self.ahead = affordable(groups.values(), ahead, memory)
        self.used = 0
        self.missed = 0
        self._source = source
        self._wait = wait
        self._ratchet = Ratchet(os.urandom(KEY_BYTES))
        self._process = os.getpid()
        self._stocks = {key: Stock(group, _target(group, self.ahead)) for key, group in groups.items()}
        self._lock = threading.Condition()
        self._last_call = 0.0
        self._failure: TsqpError | None = None
        self._closed = False
        self._filler = threading.Thread(target=self._keep_filled, name="tsqp-pads", daemon=True)

    def start(self) -> None:
        """Begin to fill the pool in idle time."""
        self._filler.start()

    def take(self, key: GroupKey, rows: int) -> list[Piece]:
        """Pads for ``rows`` rows of one call, which are then the caller's, to use once or lose.

        Raises PadsExhausted, PadReused in a forked process, and what has ended the filling.
        """
        refuse_in_fork(self._process)
        with self._lock:
            if self._failure is not None:
                raise self._failure
            stock = self._stocks[key]
            missing = max(0, rows - stock.rows)
            if missing and not self._wait:
                raise PadsExhausted(f"pads for {missing} of {rows} rows are missing: wait, or use --pads-empty wait")
            self._last_call = time.monotonic()
            self.used += rows
            self.missed += missing
            stock.last_rows = rows
            pieces, first = [], 0
            while first < rows:
                block = stock.current or (stock.ready.popleft() if stock.ready else PadBlock(self._ratchet.next_key()))
                count = min(rows - first, block.left)
                pieces.append(Piece(block, block.claim(count), first, first + count))
                stock.current = block if block.left else None
                first += count
            return pieces

    def supply(self, key: GroupKey, pieces: Sequence[Piece]) -> None:
        """Make the products that are missing. Raises CheckFailed and any error of the source."""
        self._make(self._stocks[key].group, [piece.block for piece in pieces if not piece.block.supplied])

    def fill(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Fill the pool now; ``progress`` is told the blocks that are ready and the blocks there are to be."""
        target = sum(stock.target for stock in self._stocks.values())
        while self._fill_one(idle=True):
            if progress is not None:
                progress(sum(len(stock.ready) for stock in self._stocks.values()), target)

    def ready(self, *, answer: bool) -> int:
        """Tokens of an answer, or of a prompt, whose pads are all ready."""
        with self._lock:
            return min(stock.rows for key, stock in self._stocks.items() if answer or key[1] is not None)

    def close(self) -> None:
        """Destroy all pads. Closing twice is allowed."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        if self._filler.is_alive() and threading.current_thread() is not self._filler:
            self._filler.join()
        self._ratchet.destroy()
        for stock in self._stocks.values():
            for block in (*stock.ready, *([stock.current] if stock.current else [])):
                block.destroy()
            stock.ready.clear()

    def _make(self, group: GuardedGroup, blocks: Sequence[PadBlock]) -> None:
        for start in range(0, len(blocks), MAKE_BLOCKS):
            some = blocks[start : start + MAKE_BLOCKS]
            keys = [block.key() for block in some]
            pads = np.empty((len(some) * BLOCK_ROWS, group.in_features), np.uint32)
            for index, key in enumerate(keys):
                expand(AesKeyStream(key), pads[index * BLOCK_ROWS : (index + 1) * BLOCK_ROWS])
            unchecked = self._source.products(group, keys, pads)
            if not group.products_agree(pads, unchecked):
                raise ProductMismatch("products of pads are wrong: the dealer cheats, or a machine is broken")
            for index, block in enumerate(some):  # copies, so that each block's memory is its own
                block.supply(unchecked[index * BLOCK_ROWS : (index + 1) * BLOCK_ROWS].copy())
            for secret in (pads, unchecked):
                secret.fill(ERASED)

    def _keep_filled(self) -> None:
        """The thread: make blocks while nothing else is to be done, and what an answer is about to run out of."""
        while not self._closed:
            try:
                idle = time.monotonic() - self._last_call > IDLE_S
                if not self._fill_one(idle):
                    with self._lock:
                        self._lock.wait(IDLE_S)
            except (TsqpError, RuntimeError, MemoryError) as error:
                self._failure = error if isinstance(error, TsqpError) else PadsExhausted(f"no pads were made: {error}")
                return

    def _fill_one(self, idle: bool) -> bool:
        """Make a few blocks of the group that needs them most; whether there was one."""
        with self._lock:
            wanting = [s for s in self._stocks.values() if len(s.ready) < s.target and (idle or _answering(s))]
            if not wanting or self._closed:
                return False
            stock = min(wanting, key=lambda s: len(s.ready) / s.target)
            count = min(stock.target - len(stock.ready), MAKE_BLOCKS if idle else 2)
            blocks = [PadBlock(self._ratchet.next_key()) for _ in range(count)]
        self._make(stock.group, blocks)
        with self._lock:
            stock.ready.extend(blocks)
        return True


def _answering(stock: Stock) -> bool:
    """Whether an answer is under way that is on its last block."""
    return 0 < stock.last_rows <= BLOCK_ROWS and not stock.ready


def _target(group: GuardedGroup, ahead: int) -> int:
    rows = min(ahead, HEAD_ROWS) if group.key[1] is None else ahead
    return -(-rows // BLOCK_ROWS)


def block_bytes(group: GuardedGroup) -> int:
    """Memory of one block that is ready."""
    return BLOCK_ROWS * group.out_features * 4 + KEY_BYTES


def affordable(groups: Collection[GuardedGroup], ahead: int, memory: int) -> int:
    """The tokens, at most ``ahead`` and in whole blocks, whose pads fit into ``memory`` bytes."""
    for tokens in range(-(-ahead // BLOCK_ROWS) * BLOCK_ROWS, 0, -BLOCK_ROWS):
        if sum(_target(group, tokens) * block_bytes(group) for group in groups) <= memory:
            return tokens
    return 0
