"""Where attention is computed: here, or its two products on a worker with softmax between them here."""

from __future__ import annotations

from typing import Protocol

import torch

from tsqp.model.attention import attend, causal_mask, first_visible, masked_softmax
from tsqp.trusted.batch import Span
from tsqp.trusted.pending import Steps
from tsqp.trusted.session import WorkerSession
from tsqp.trusted.stats import Stats
from tsqp.wire.messages import Mix, Scores


class Attention(Protocol):
    """Causal attention of one sequence's rows over its cache."""

    def steps(self, layer: int, q: torch.Tensor, span: Span) -> Steps[torch.Tensor]:
        """q (T, heads, head_dim) of the span's rows to (T, heads, head_dim); the cache already holds their keys."""


class LocalAttention:
    """Flash-style attention on the trusted side: scores are never materialised and never leave."""

    def __init__(self, windows: tuple[int | None, ...], stats: Stats) -> None:
        self._windows = windows
        self._stats = stats

    def steps(self, layer: int, q: torch.Tensor, span: Span) -> Steps[torch.Tensor]:
        window = self._windows[layer]
        first = first_visible(span.position, window)
        k, v = span.cache.view(layer, first, span.end)
        with self._stats.operator("softmax"):
            return attend(q, k, v, span.position, first, window)
        yield  # a generator that hands out no products


class OpenAttention:
    """Q·Kᵀ and probabilities·V on the worker; mask and softmax here. Scores cross the wire twice."""

    def __init__(self, session: WorkerSession) -> None:
        self._session = session

    def steps(self, layer: int, q: torch.Tensor, span: Span) -> Steps[torch.Tensor]:
        spec, session = self._session.spec, self._session
        window = spec.windows[layer]
        first = first_visible(span.position, window)
        k, v = span.cache.view(layer, first, span.end)
        rows, keys = q.shape[0], k.shape[1]
        call = Scores(session.next_id(), rows, keys)
        scaled = q.transpose(0, 1) * spec.head_dim**-0.5  # before the product, so that float16 scores stay finite
        scores = yield session.start("matmul", call, [scaled, k], (spec.num_heads, rows, keys))
        with session.stats.operator("softmax"):
            mask = causal_mask(span.position, rows, first, keys, window)
            probabilities = masked_softmax(scores, mask)
        mix = Mix(session.next_id(), rows, keys)
        mixed = yield session.start("matmul", mix, [probabilities, v], (spec.num_heads, rows, spec.head_dim))
        return mixed.transpose(0, 1)
