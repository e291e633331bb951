"""Embedding, linear layers and attention in this process, by weights that it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from tsqp.config.groups import GroupKey
from tsqp.model.attention import attend, first_visible
from tsqp.model.batch import SequenceRows
from tsqp.model.cache import KVCache
from tsqp.model.linear import LinearProduct
from tsqp.model.meter import CallKind, Meter
from tsqp.model.pending import Deferred, Pending, Steps


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
    """Every product by weights of this process."""

    def __init__(self, weights: Mapping[GroupKey, LinearProduct], meter: Meter) -> None:
        self._weights = weights
        self._meter = meter

    def input(self, key: GroupKey, rows: int) -> torch.Tensor:
        return self._weights[key].input(rows)

    def start(self, key: GroupKey, x: torch.Tensor) -> Pending:
        def product() -> torch.Tensor:
            with self._meter.product(call_kind(key)):
                return self._weights[key].product(x)

        return Deferred(product)


class LocalAttention:
    """Attention without materialised scores where torch has a fused kernel, in blocks where that is faster."""

    def __init__(self, windows: tuple[int | None, ...], meter: Meter) -> None:
        self._windows = windows
        self._meter = meter

    def steps(
        self, layer: int, q: torch.Tensor, spans: Sequence[SequenceRows[KVCache]], out: torch.Tensor
    ) -> Steps[None]:
        window = self._windows[layer]
        with self._meter.operator("softmax"):
            for span in spans:
                first = first_visible(span.position, window)
                k, v = span.cache.view(layer, first, span.end)
                attend(q[:, span.slice], k, v, span.position, first, window, out[span.slice])
        return
        yield  # a generator that hands out no products
