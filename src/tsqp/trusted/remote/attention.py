"""Attention whose two products run on a worker, with softmax between them here."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tsqp.model.attention import causal_mask, first_visible, masked_softmax
from tsqp.model.batch import Chunk, SequenceRows
from tsqp.model.cache import KVCache
from tsqp.model.pending import Steps
from tsqp.trusted.remote.session import WorkerSession
from tsqp.wire.messages import AttentionScores, AttentionValues


class OpenAttention:
    """Q·Kᵀ and probabilities·V on the worker; mask and softmax here. Scores cross the wire twice."""

    def __init__(self, session: WorkerSession) -> None:
        self._session = session

    def of(self, chunk: Chunk[KVCache]) -> OpenChunkAttention:
        return OpenChunkAttention(self._session, chunk)


@dataclass(frozen=True)
class OpenChunkAttention:
    """The same, of one chunk."""

    _session: WorkerSession
    _chunk: Chunk[KVCache]

    def steps(self, layer: int, q: torch.Tensor, out: torch.Tensor) -> Steps[None]:
        heads = out.view(len(out), q.shape[0], q.shape[2])
        for span in self._chunk.spans:
            yield from self._of_one(layer, q[:, span.slice], span, heads[span.slice])

    def _of_one(self, layer: int, q: torch.Tensor, span: SequenceRows[KVCache], out: torch.Tensor) -> Steps[None]:
        config, session = self._session.config, self._session
        window = config.windows[layer]
        first = first_visible(span.position, window)
        k, v = span.cache.view(layer, first, span.end)
        rows, keys = q.shape[1], k.shape[1]
        call = AttentionScores(session.next_id(), rows, keys)
        scaled = q * config.attention_scale  # before the product, so that float16 scores stay finite
        scores = yield session.start("matmul", call, [scaled, k], (config.num_heads, rows, keys))
        with session.stats.operator("softmax"):
            mask = causal_mask(span.position, rows, first, keys, window)
            probabilities = masked_softmax(scores, mask, config.score_cap)
        mix = AttentionValues(session.next_id(), rows, keys)
        mixed = yield session.start("matmul", mix, [probabilities, v], (config.num_heads, rows, config.head_dim))
        out.copy_(mixed.transpose(0, 1))
