"""Embedding, linear layers and attention in this process, by weights that it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tsqp.arith.bits import keep_bits
from tsqp.config.groups import GroupKey
from tsqp.model.attention import attend, first_visible, fused_is_fast
from tsqp.model.batch import Chunk, SequenceRows
from tsqp.model.block_attention import BlockAttention
from tsqp.model.cache import KVCache
from tsqp.model.linear import LinearProduct, prepared
from tsqp.model.meter import CallKind, Meter
from tsqp.model.operators import Attention
from tsqp.model.pending import Deferred, Pending, Steps
from tsqp.wire.slot import KEPT_ROWS, Shelf


def call_kind(key: GroupKey) -> CallKind:
    """What a group's products are counted as."""
    return "lm_head" if key[0] == "lm_head" else "linear"


class LocalEmbedding:
    """A look-up in ``table`` (vocab_size, hidden_size), handed out in ``dtype``, by default the table's."""

    def __init__(self, table: torch.Tensor, meter: Meter, dtype: torch.dtype | None = None) -> None:
        self._table = table
        self._meter = meter
        self._dtype = dtype or table.dtype

    def start(self, tokens: torch.Tensor) -> Pending:
        def look_up() -> torch.Tensor:
            with self._meter.product("embedding"):
                return F.embedding(tokens, self._table).to(self._dtype)

        return Deferred(look_up)


class LocalLinears:
    """Every product by weights of this process. Few rows have memory that stays, with products bound to it."""

    def __init__(self, weights: Mapping[GroupKey, LinearProduct], meter: Meter) -> None:
        self._weights = weights
        self._meter = meter
        self._desks = Shelf(self._new_desk)

    def input(self, key: GroupKey, rows: int) -> torch.Tensor:
        return self._desks.hand_out(key, rows).x if rows <= KEPT_ROWS else self._weights[key].input(rows)

    def start(self, key: GroupKey, x: torch.Tensor) -> Pending:
        desk = self._desks.claim(key, x)
        if desk is not None:
            return LocalProduct(self._desks, desk, key, self._weights[key], self._meter)

        def product() -> torch.Tensor:
            with self._meter.product(call_kind(key)):
                return self._weights[key].product(x)

        return Deferred(product)

    def _new_desk(self, key: GroupKey, rows: int) -> Desk:
        return Desk(key, self._weights[key].input(rows), self._weights[key].group.out_features)


class Desk:
    """Memory for one product after another of one shape: x (rows, in_features) and y (rows, out_features)."""

    def __init__(self, key: GroupKey, x: torch.Tensor, out_features: int) -> None:
        self.key, self.rows = key, len(x)
        self.x = keep_bits(x)
        self.y = keep_bits(x.new_empty(len(x), out_features))
        self.runs: dict[GroupKey, Callable[[], object]] = {}  # products of x by weights, into y


class LocalProduct:
    """A product at a desk, computed when it is waited for; see ``Pending``."""

    def __init__(self, shelf: Shelf[Desk], desk: Desk, key: GroupKey, weights: LinearProduct, meter: Meter) -> None:
        self._shelf, self._desk, self._key, self._weights, self._meter = shelf, desk, key, weights, meter
        self._done = False  # the product is there, and was not released

    def wait(self) -> torch.Tensor:
        desk, key = self._desk, self._key
        run = desk.runs.get(key)
        if run is None:
            run = desk.runs[key] = prepared(self._weights, desk.x, None, desk.y)
        with self._meter.product(call_kind(key)):
            run()
        self._done = True
        return desk.y

    def release(self) -> None:
        if self._done:
            self._done = False
            self._shelf.put_back(self._desk)


class TorchAttention:
    """Attention by torch, of every dtype on every device, one sequence after another."""

    def __init__(
        self, windows: tuple[int | None, ...], meter: Meter, scale: float | None = None, cap: float | None = None
    ) -> None:
        self._windows = windows
        self._meter = meter
        self._scale = scale
        self._cap = cap

    def of(self, chunk: Chunk[KVCache]) -> TorchChunkAttention:
        """See ``Attention.of``."""
        return TorchChunkAttention(self._windows, self._meter, chunk.spans, self._scale, self._cap)


@dataclass(frozen=True)
class TorchChunkAttention:
    """The same, of one chunk."""

    _windows: tuple[int | None, ...]
    _meter: Meter
    _spans: Sequence[SequenceRows[KVCache]]
    _scale: float | None
    _cap: float | None

    def steps(self, layer: int, q: torch.Tensor, out: torch.Tensor) -> Steps[None]:
        """See ``ChunkAttention.steps``."""
        with self._meter.operator("softmax"):
            attend_spans(q, self._spans, self._windows[layer], self._scale, self._cap, layer, out)
        return
        yield  # a generator that hands out no products


class StepAttention(BlockAttention):
    """Compiled loops for decode steps alone, torch's fused kernel for all other rows."""

    def _attend_rows(
        self, layer: int, q: torch.Tensor, spans: Sequence[SequenceRows[KVCache]], out: torch.Tensor
    ) -> None:
        attend_spans(q, spans, self._windows[layer], self._scale, self._cap, layer, out)


def attend_spans(
    q: torch.Tensor,
    spans: Sequence[SequenceRows[KVCache]],
    window: int | None,
    scale: float | None,
    cap: float | None,
    layer: int,
    out: torch.Tensor,
) -> None:
    """Rows of several sequences, by torch: q (heads, T, head_dim) to out (T, heads·head_dim)."""
    heads = out.view(len(out), q.shape[0], q.shape[2])
    for span in spans:
        first = first_visible(span.position, window)
        k, v = span.cache.view(layer, first, span.end)
        attend(q[:, span.slice], k, v, span.position, first, window, heads[span.slice], scale, cap)


def pick_attention(
    windows: tuple[int | None, ...],
    dtype: torch.dtype,
    meter: Meter,
    device: str | torch.device = "cpu",
    *,
    compiled: bool = True,
    scale: float | None = None,
    cap: float | None = None,
) -> Attention:
    """Attention over caches of ``dtype``: compiled loops where there are any, unless told otherwise, else torch.

    ``scale`` multiplies Q·Kᵀ: 1/√head_dim for None. ``cap``: the soft cap of scores.
    """
    if not (compiled and dtype in (torch.bfloat16, torch.float32) and torch.device(device).type == "cpu"):
        return TorchAttention(windows, meter, scale, cap)
    kind = StepAttention if dtype == torch.bfloat16 and fused_is_fast() else BlockAttention
    attention = kind(windows, meter, scale, cap)
    attention.compile(dtype, dtype)
    return attention
