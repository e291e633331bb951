"""Attention in blocks at fixed positions: the same bits for a row, whatever crosses the layers together with it.

A sum of floats depends on its order, so every order here is decided by the position of a query and by nothing else: not
by the chunk, the batch, a micro-batch or the number of threads.

- Prefill: queries in blocks of ``BLOCK_QUERIES`` and keys in blocks of ``BLOCK_KEYS``, both counted from position 0. A
  product always has the shape of whole blocks, because matrix libraries choose a kernel, and with it an order, by the
  shape; a row always lies at the same place of its block. Rows that are not there are computed and thrown away. Keys
  that a query does not see have weight 0, and the cache holds finite numbers there.
- Decode: a query alone of its sequence is done by a loop of its own, which reads each key and value once for all heads
  that share them. Its parts are ranges of keys at multiples of ``PART_KEYS``, joined in their order.

Which of both does a row is not a question of chunks either: see ``SequenceRows.alone``. Both keep the greatest score
and the sum of weights while they go over the keys (online softmax: Milakov and Gimelshein 2018; Dao et al. 2022).

Covers: equal bits on one machine with one version of torch. Does not cover: another processor or version, whose
products may be summed in another order. Tests: ``tests/model/test_block_attention.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from tsqp.arith.bits import bits
from tsqp.arith.row_threads import row_threads
from tsqp.model.attention import first_visible
from tsqp.model.batch import SequenceRows
from tsqp.model.cache import BLOCK_QUERIES, KVCache
from tsqp.model.meter import Meter
from tsqp.model.pending import Steps

BLOCK_KEYS = 512  # keys of one product: scores and weights of a block of queries still fit the cache
SPLIT_QUERIES = 64  # fewer queries · heads than this are done by one thread
SPLIT_ITEMS = 2
SPLIT_KEYS = 8192  # fewer keys · KV heads of decode steps are done by one thread: in the time that waking another takes
NO_WINDOW = 2**62


class BlockAttention:
    """Attention in this process over caches of bfloat16 or float32 on the CPU."""

    def __init__(self, windows: tuple[int | None, ...], meter: Meter) -> None:
        from tsqp.model import compiled_attention  # compiling costs a second: only for those who attend this way

        self._loops = compiled_attention
        self._windows = windows
        self._meter = meter
        self._threads = row_threads()
        self._block: _Block | None = None

    def compile(self, dtype: torch.dtype) -> None:
        """Have numba compile the loops for caches of ``dtype`` by work of no rows, so that no call waits for it."""
        loops, rows, one = self._loops, np.zeros(2, np.int64), np.float32(1)
        kept = bits(torch.zeros(1, 1, 1, dtype=dtype))
        products = bits(torch.zeros(1, 1, 1, dtype=product_dtype(dtype)))
        floats, table = np.zeros((1, 1, 1), np.float32), np.zeros((1, 4), np.int64)
        loops.attend_steps(kept, table, table, 1, one, floats, 0, 0)
        loops.join_parts(floats, rows, table, floats, 0, 0)
        loops.soften(products, products, floats, 0, rows, 0, NO_WINDOW, one, 0, 0)
        loops.accumulate(products, floats, rows, floats, 0, 0)
        loops.finish(floats, floats, rows, floats, 0, 0, 0)

    def steps(
        self, layer: int, q: torch.Tensor, spans: Sequence[SequenceRows[KVCache]], out: torch.Tensor
    ) -> Steps[None]:
        """See ``Attention.steps``."""
        with self._meter.operator("softmax"):
            alone = [span for span in spans if span.alone]
            if alone:
                self._attend_steps(layer, q, alone, out)
            for span in spans:
                if not span.alone:
                    self._attend_blocks(layer, q, span, out)
        return
        yield  # a generator that hands out no products

    def _attend_steps(
        self, layer: int, q: torch.Tensor, spans: Sequence[SequenceRows[KVCache]], out: torch.Tensor
    ) -> None:
        """All decode steps of a chunk at once: items of work of about equal size, shared out over threads."""
        window, size = self._windows[layer], self._loops.PART_KEYS
        heads, _, head_dim = q.shape
        # The loop reads by address: the spans keep the caches, and nothing grows them before it is done.
        caches = [(span.first, *span.cache.place(layer)) for span in spans]
        items: list[tuple[int, int, int]] = []
        starts = [0]
        for sequence, span in enumerate(spans):
            first = first_visible(span.position, window)
            edges = range(first // size * size, span.end, size)
            items.extend((sequence, max(edge, first), min(edge + size, span.end)) for edge in edges)
            starts.append(len(items))
        kv_heads = spans[0].cache.kv_heads
        scale = np.float32(1 / math.sqrt(head_dim))
        keys = sum(end - first for _, first, end in items)
        table, work = np.array(caches, np.int64), np.array(items, np.int64)
        parts = np.empty((len(items), heads, head_dim + 2), np.float32)
        self._threads.run(
            self._loops.attend_steps,
            len(items) * kv_heads,
            bits(q),
            table,
            work,
            kv_heads,
            scale,
            parts,
            least=SPLIT_ITEMS if keys * kv_heads >= SPLIT_KEYS else len(items) * kv_heads + 1,
        )
        self._loops.join_parts(parts, np.array(starts, np.int64), table, bits(out), 0, len(spans))

    def _attend_blocks(self, layer: int, q: torch.Tensor, span: SequenceRows[KVCache], out: torch.Tensor) -> None:
        """The rows of one sequence, block of queries by block of queries."""
        for start in range(span.position // BLOCK_QUERIES * BLOCK_QUERIES, span.end, BLOCK_QUERIES):
            low, high = max(start, span.position), min(start + BLOCK_QUERIES, span.end)
            self._attend_block(layer, q, span, start, low, high, out)

    def _attend_block(
        self,
        layer: int,
        q: torch.Tensor,
        span: SequenceRows[KVCache],
        start: int,
        low: int,
        high: int,
        out: torch.Tensor,
    ) -> None:
        """Queries of positions ``low`` to ``high``, which belong to the block that starts at ``start``."""
        heads, _, head_dim = q.shape
        window = self._windows[layer]
        end = start + BLOCK_QUERIES
        row = span.first + low - span.position
        kv_heads = span.cache.view(layer, 0, 0)[0].shape[0]
        block = self._scratch(heads, kv_heads, head_dim, q.dtype)
        block.queries.view(heads, BLOCK_QUERIES, head_dim)[:, low - start : high - start] = q[:, row : row + high - low]
        block.begin()
        rows = np.array((low - start, high - start), np.int64)
        count = heads * (high - low)
        scale = np.float32(1 / math.sqrt(head_dim))
        for first_key in range(first_visible(start, window) // BLOCK_KEYS * BLOCK_KEYS, end, BLOCK_KEYS):
            k, v = span.cache.view(layer, first_key, min(first_key + BLOCK_KEYS, end))
            scores, weights = block.scores(k.shape[1]), block.weights(k.shape[1])
            torch.bmm(block.queries, k.to(block.dtype).transpose(1, 2), out=scores)
            self._threads.run(
                self._loops.soften,
                count,
                bits(scores.view(heads, BLOCK_QUERIES, -1)),
                bits(weights.view(heads, BLOCK_QUERIES, -1)),
                block.state,
                start,
                rows,
                first_key,
                window or NO_WINDOW,
                scale,
                least=SPLIT_QUERIES,
            )
            torch.bmm(weights, v.to(block.dtype), out=block.mixed)
            mixed = bits(block.mixed.view(heads, BLOCK_QUERIES, head_dim))
            self._threads.run(self._loops.accumulate, count, mixed, block.state, rows, block.sums, least=SPLIT_QUERIES)
        self._threads.run(self._loops.finish, count, block.sums, block.state, rows, bits(out), row, least=SPLIT_QUERIES)

    def _scratch(self, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> _Block:
        wanted = product_dtype(dtype)
        if self._block is None or self._block.shape != (heads, kv_heads, head_dim) or self._block.dtype != wanted:
            self._block = _Block(heads, kv_heads, head_dim, wanted)
        return self._block


class _Block:
    """Memory for one block of queries; the heads of a group are rows of one product with their shared keys.

    Zeros at first: rows that are not wanted are multiplied too, and stay finite.
    """

    def __init__(self, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.shape = heads, kv_heads, head_dim
        self.dtype = dtype
        rows = heads // kv_heads * BLOCK_QUERIES
        self.queries = torch.zeros(kv_heads, rows, head_dim, dtype=dtype)
        self.mixed = torch.zeros(kv_heads, rows, head_dim, dtype=dtype)
        self.sums = np.zeros((heads, BLOCK_QUERIES, head_dim), np.float32)
        self.state = np.zeros((heads, BLOCK_QUERIES, 3), np.float32)
        self._scores = torch.zeros(kv_heads * rows * BLOCK_KEYS, dtype=dtype)
        self._weights = torch.zeros(kv_heads * rows * BLOCK_KEYS, dtype=dtype)

    def begin(self) -> None:
        """No key has been seen."""
        self.sums.fill(0)
        self.state[:, :, 0] = -np.inf
        self.state[:, :, 1] = 0

    def scores(self, keys: int) -> torch.Tensor:
        """Memory for the scores of ``keys`` keys, (kv_heads, group · block, keys)."""
        return self._of(self._scores, keys)

    def weights(self, keys: int) -> torch.Tensor:
        """The same for the weights."""
        return self._of(self._weights, keys)

    def _of(self, memory: torch.Tensor, keys: int) -> torch.Tensor:
        kv_heads, rows, _ = self.queries.shape
        return memory[: kv_heads * rows * keys].view(kv_heads, rows, keys)


@cache
def product_dtype(stored: torch.dtype) -> torch.dtype:
    """What products are made in: what the cache holds, or float32 where the machine has no fast bfloat16."""
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return stored if stored == torch.float32 or fast else torch.float32
