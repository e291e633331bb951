"""When pads are made ahead of time, and how many: in idle time, up to what was asked for and what memory allows.

Policy only: it knows sizes and counts, and never sees a pad.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import partial

from tsqp.arith.expand import BLOCK_ROWS, KEY_BYTES
from tsqp.arith.secret_memory import secret_memory
from tsqp.config.groups import GroupKey, group_keys, linear_groups
from tsqp.config.model import ModelConfig
from tsqp.errors import ChannelClosed, TsqpError, forget_frames
from tsqp.trusted.guard.pool import MAKE_BLOCKS, PadPool

HEAD_ROWS = 64  # the LM head needs one row for a token of the answer, and one for a whole prompt; see ``targets``
IDLE_S = 0.05  # without a call for so long, the cores are free
SPARE_BYTES = 256 << 20  # of secret memory that stay for the next call once the pool is full
GIVE_BYTES = 64 << 20  # of the rest that are given back at a time: a request that comes meanwhile waits for so many


def targets(config: ModelConfig, ahead: int, memory: int, *, whole_answers: bool = False) -> dict[GroupKey, int]:
    """Blocks to keep ready of each group: pads for at most ``ahead`` tokens, and at most ``memory`` bytes.

    ``whole_answers``: as many for the LM head as for the layers.
    """
    wanted = range(-(-ahead // BLOCK_ROWS) + 1)
    held = partial(held_bytes, config, whole_answers=whole_answers)
    return _blocks(config, bisect_right(wanted, memory, key=held) - 1, whole_answers)


def held_bytes(config: ModelConfig, count: int, *, whole_answers: bool = False) -> int:
    """Memory of a pool that keeps ``count`` blocks of each group of the layers."""
    groups, counts = linear_groups(config), _blocks(config, count, whole_answers)
    return sum(blocks * block_bytes(groups[key[0]].out_features) for key, blocks in counts.items())


def _blocks(config: ModelConfig, count: int, whole_answers: bool) -> dict[GroupKey, int]:
    head = count if whole_answers else min(count, HEAD_ROWS // BLOCK_ROWS)
    return {key: head if key[1] is None else count for key in group_keys(config)}


def block_bytes(out_features: int) -> int:
    """Memory of one block of pads that is ready."""
    return BLOCK_ROWS * out_features * 4 + KEY_BYTES


class PadFiller:
    """Keeps a pool filled to its targets. ``start`` begins a thread; without it nothing happens but by ``fill``.

    ``busy`` tells whether a forward pass is under way: a call of a large model may take longer than ``IDLE_S``.
    ``filled`` is called by the thread, once: when it finds the pool full for the first time.
    """

    def __init__(self, pool: PadPool, blocks: Mapping[GroupKey, int]) -> None:
        self.busy: Callable[[], bool] = lambda: False
        self.filled: Callable[[], None] = lambda: None
        self.blocks = {key: count for key, count in blocks.items() if count}
        self.pool = pool
        self._stop = threading.Event()
        self._one_at_a_time = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="tsqp-pads", daemon=True)

    def start(self) -> None:
        """Begin to fill in idle time. Starting twice is allowed."""
        if self._thread.ident is None and not self._stop.is_set():
            self._thread.start()

    @property
    def ahead(self) -> int:
        """Tokens of a prompt whose pads are kept ready."""
        return BLOCK_ROWS * min((count for (_, layer), count in self.blocks.items() if layer is not None), default=0)

    @property
    def whole_answers(self) -> int:
        """Tokens of a prompt and its answer whose pads are kept ready: in every group, the LM head's too."""
        return BLOCK_ROWS * min(self.blocks.get(key, 0) for key in self.pool.keys)

    @property
    def failure(self) -> TsqpError | None:
        """What has ended the making of pads, if it has ended."""
        return next(iter(self.pool.failures), None)

    def ready(self, *, answer: bool) -> int:
        """Tokens of an answer, or of a prompt, whose pads are ready in every group."""
        return min(self.pool.ready(key) for key in self.pool.keys if answer or key[1] is not None)

    def fill(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Fill the pool now; ``progress`` is told the blocks that are ready and the blocks there are to be."""
        while self.make_some():
            if progress is not None:
                ready = sum(min(self.pool.ready(key) // BLOCK_ROWS, count) for key, count in self.blocks.items())
                progress(ready, sum(self.blocks.values()))

    def make_some(self) -> bool:
        """Make a few blocks of the group that needs them most; False where the pool is full."""
        return self._make_some(idle=True)

    def close(self) -> None:
        """End the thread. Closing twice is allowed."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        for error in self.pool.failures:
            forget_frames(error)  # which would keep the pool until the next collection of garbage

    def _run(self) -> None:
        filling = True  # for the first time
        while not self._stop.is_set():
            try:
                idle = self._is_idle()
                if not self._make_some(idle=idle):
                    if idle:
                        memory = secret_memory()
                        memory.give_back(keep=max(SPARE_BYTES, memory.spare_bytes() - GIVE_BYTES))
                    if filling and idle:
                        filling = False
                        self.filled()
                    self._stop.wait(IDLE_S)
            except Exception as error:  # whatever it is, the run must hear of it
                if not isinstance(error, TsqpError):
                    error = ChannelClosed(f"no pads could be made: {error}")
                forget_frames(error)  # they would keep the pool, and the pool would keep them
                if error not in self.pool.failures:  # it came from elsewhere than from making pads
                    self.pool.failures.append(error)
                return

    def _make_some(self, idle: bool) -> bool:
        """Make a few blocks of the group that needs them most; whether there was one."""
        with self._one_at_a_time:
            ready = {key: self.pool.ready(key) // BLOCK_ROWS for key in self.blocks}
            wanting = [key for key in ready if ready[key] < self.blocks[key] and (idle or self._runs_out(key))]
            if not wanting or self._stop.is_set():
                return False
            key = min(wanting, key=lambda key: ready[key] / self.blocks[key])
            self.pool.make(key, min(self.blocks[key] - ready[key], MAKE_BLOCKS if idle else 2))
            return True

    def _is_idle(self) -> bool:
        if self.busy():
            return False
        last = max((when for when, _ in list(self.pool.recent.values())), default=0.0)
        return time.monotonic() - last > IDLE_S

    def _runs_out(self, key: GroupKey) -> bool:
        """Whether an answer is under way that is on its last block: better made now than by the call that needs it."""
        _, rows = self.pool.recent.get(key, (0.0, 0))
        return 0 < rows <= BLOCK_ROWS and self.pool.ready(key) < BLOCK_ROWS
