"""Attention by compiled loops: the same bits for a row, whatever crosses the layers together with it.

A sum of floats depends on its order, so every order here is decided by the position of a query and by nothing else: not
by the chunk, the batch, a micro-batch or the number of threads.

- Prefill: a thread takes some queries of one sequence with one KV head, and goes over the keys in blocks that are
  counted from position 0. The terms of a score, and of a weighted sum within a block, come in the order of columns and
  of keys. Keys that a query does not see have weight 0, which adds nothing to a sum.
- Decode: a query alone of its sequence is done by a loop of its own, which reads each key and value once for all heads
  that share them. Its parts are ranges of keys at multiples of ``PART_KEYS``, joined in their order.

Which of both does a row is not a question of chunks either: see ``SequenceRows.alone``. Both keep the greatest score
and the sum of weights while they go over the keys (online softmax: Milakov and Gimelshein 2018; Dao et al. 2022).
Caches of int8 have loops of their own, in the same order, whose products are exact (``int8_attention.py``).

Covers: equal bits on processors of one kind with one version of numba. Does not cover: another processor, whose
instructions round sums otherwise (``attention_tiles.py``). Tests: ``tests/model/test_block_attention.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import torch

from tsqp.arith.bits import Array, bits
from tsqp.arith.row_threads import row_threads
from tsqp.model.attention import first_visible
from tsqp.model.batch import Chunk, SequenceRows
from tsqp.model.cache import KVCache, query_dtype
from tsqp.model.meter import Meter
from tsqp.model.pending import Steps

SPLIT_PAIRS = 1 << 16  # fewer pairs of query and key than this are done by one thread: waking another takes longer
NO_WINDOW = 2**62

Spans = Sequence[SequenceRows[KVCache]]


class BlockAttention:
    """Attention in this process over caches of bfloat16, float32 or int8 on the CPU."""

    def __init__(
        self, windows: tuple[int | None, ...], meter: Meter, scale: float | None = None, cap: float | None = None
    ) -> None:
        """``scale`` multiplies Q·Kᵀ: 1/√head_dim for None. ``cap``: the soft cap of scores."""
        # Compiling costs seconds: only for those who attend this way.
        from tsqp.model import compiled_attention, int8_attention

        self._float_loops: Any = compiled_attention
        self._int8_loops: Any = int8_attention
        self._windows = windows
        self._meter = meter
        self._scale = scale
        self._cap = cap
        self._loop_cap = np.float32(cap or 0)
        self._threads = row_threads()

    def compile(self, dtype: torch.dtype, out_dtype: torch.dtype = torch.float32) -> None:
        """Have numba compile the loops for caches of ``dtype`` by work of no rows, so that no call waits for it."""
        loops, one, floats = self._loops_for(dtype), np.float32(1), np.zeros((1, 1, 2), np.float32)
        q, table = words(torch.zeros(1, 1, 2, dtype=query_dtype(dtype))), np.zeros((1, 8), np.int64)
        out = bits(torch.zeros(1, 1, 2, dtype=out_dtype))
        loops.attend_steps(q, table, 1, one, self._loop_cap, table, floats, table[0], out, 0, 0)
        loops.join_parts(floats, table[0], table, out, 0, 0)
        loops.attend_rows(q, table, 1, one, self._loop_cap, NO_WINDOW, out, 0, 0)

    def _loops_for(self, dtype: torch.dtype) -> Any:
        """Those for caches of ``dtype``; both have the same names and take the same arguments."""
        return self._int8_loops if dtype == torch.int8 else self._float_loops

    def of(self, chunk: Chunk[KVCache]) -> BlocksOfChunk:
        """See ``Attention.of``."""
        return BlocksOfChunk(self, chunk.spans)

    def attend(self, layer: int, q: torch.Tensor, spans: BlocksOfChunk, out: torch.Tensor) -> None:
        """All rows of a chunk; see ``ChunkAttention.steps``."""
        with self._meter.operator("softmax"):
            self.attend_all(layer, q, spans, out)

    def attend_all(self, layer: int, q: torch.Tensor, spans: BlocksOfChunk, out: torch.Tensor) -> None:
        """The same, for who takes the time."""
        if spans.alone:
            self._attend_steps(layer, q, spans, out)
        if spans.others:
            self._attend_rows(layer, q, spans.others, out)

    def _attend_steps(self, layer: int, q: torch.Tensor, spans: BlocksOfChunk, out: torch.Tensor) -> None:
        """All decode steps of a chunk at once, each in parts of its keys."""
        loops = self._loops_for(spans.alone[0].cache.dtype)
        parts = spans.parts(self._windows[layer], loops.PART_KEYS, q.shape)
        # By address: the spans keep the caches, and nothing grows them before the loop is done.
        caches = np.array([(span.first, *span.cache.memory(layer)) for span in spans.alone], np.int64)
        work = len(parts.items) * spans.kv_heads
        arguments = (
            parts.items,
            spans.kv_heads,
            self._scale_of(q),
            self._loop_cap,
            caches,
            parts.sums,
            parts.starts,
            _heads_of(out, q),
        )
        if self._shared(loops.attend_steps, parts.keys, work, q, *arguments):
            loops.join_parts(parts.sums, parts.starts, caches, arguments[-1], 0, len(caches))

    def _attend_rows(self, layer: int, q: torch.Tensor, spans: Spans, out: torch.Tensor) -> None:
        """The rows of sequences that have several, in blocks of queries."""
        loops = self._loops_for(spans[0].cache.dtype)
        size, kv_heads = loops.BLOCK_QUERIES, spans[0].cache.kv_heads
        items = [
            (span.first + start, span.position + start, min(size, span.rows - start), *span.cache.memory(layer))
            for span in spans
            for start in range(0, span.rows, size)
        ]
        pairs = sum((position + rows) * rows for _, position, rows, *_ in items)
        window, work = self._windows[layer] or NO_WINDOW, len(items) * kv_heads
        arguments = (_balanced(items), kv_heads, self._scale_of(q), self._loop_cap, window, _heads_of(out, q))
        self._shared(loops.attend_rows, pairs, work, q, *arguments)

    def _scale_of(self, q: torch.Tensor) -> np.float32:
        return np.float32(q.shape[2] ** -0.5 if self._scale is None else self._scale)

    def _shared(self, loop: Any, pairs: int, work: int, q: torch.Tensor, *arguments: Any) -> bool:
        """``loop`` over all work, shared out over threads if that is worth while; whether it was shared out."""
        share = self._threads.threads > 1 and work > 1 and pairs * q.shape[0] >= SPLIT_PAIRS
        self._threads.run(loop, work, words(q), *arguments, least=2 if share else work + 1)
        return share


class BlocksOfChunk:
    """Attention of one chunk; see ``ChunkAttention``. What its layers share is made once."""

    def __init__(self, attention: BlockAttention, spans: Spans) -> None:
        self._attention = attention
        self.alone = [span for span in spans if span.alone]
        self.others = [span for span in spans if not span.alone]
        self.kv_heads = spans[0].cache.kv_heads if spans else 0
        self._parts: dict[int | None, _Parts] = {}

    def steps(self, layer: int, q: torch.Tensor, out: torch.Tensor) -> Steps[None]:
        """See ``ChunkAttention.steps``."""
        self._attention.attend(layer, q, self, out)
        return
        yield  # a generator that hands out no products

    def parts(self, window: int | None, size: int, shape: Sequence[int]) -> _Parts:
        """The work of its decode steps under a window, in parts of ``size`` keys; ``shape``: that of the queries."""
        parts = self._parts.get(window)
        if parts is None:
            parts = self._parts[window] = _Parts.of(self.alone, window, size, shape[0], shape[2])
        return parts


@dataclass(frozen=True)
class _Parts:
    """Decode steps in parts of their keys, as ``attend_steps`` has them, and room for what the parts add up.

    items int64 (n, 3), starts int64 (sequences + 1,), sums float32 (n, heads, head_dim + 2); ``keys``: of all parts.
    """

    items: Array
    starts: Array
    sums: Array
    keys: int

    @classmethod
    def of(cls, spans: Spans, window: int | None, size: int, heads: int, head_dim: int) -> _Parts:
        parts: list[tuple[int, int, int]] = []
        starts = [0]
        for sequence, span in enumerate(spans):
            first = first_visible(span.position, window)
            edges = range(first // size * size, span.end, size)
            parts.extend((sequence, max(edge, first), min(edge + size, span.end)) for edge in edges)
            starts.append(len(parts))
        sums = np.empty((len(parts), heads, head_dim + 2), np.float32)
        keys = sum(end - first for _, first, end in parts)
        return cls(np.array(parts, np.int64), np.array(starts, np.int64), sums, keys)


def _heads_of(out: torch.Tensor, q: torch.Tensor) -> Array:
    """out (T, heads·head_dim) as (T, heads, head_dim)."""
    return bits(out).reshape(out.shape[0], q.shape[0], q.shape[2])


def words(tensor: torch.Tensor) -> Any:
    """A tensor's memory as loops of attention take it: float32, or two neighbouring bfloat16 numbers as uint32."""
    return bits(tensor) if tensor.dtype == torch.float32 else bits(tensor).view(np.uint32)


def _balanced(items: Sequence[tuple[int, ...]]) -> Any:
    """Items with the earliest position beside the latest, which sees the most keys: each half has half of the work."""
    ordered = sorted(items, key=itemgetter(1))
    return np.array([ordered[-1 - i // 2 if i % 2 else i // 2] for i in range(len(ordered))], np.int64)
