"""A Llama-family decoder that asks for its products and does not know where they are computed.

A partition is a choice of the ``Embedding``, ``Linears`` and ``Attention`` objects it is given. One code path serves
prefill, decode, chunks, micro-batches and batches: flat rows, each with a position, and a cache per sequence.
"""

from __future__ import annotations

import torch

from tsqp.arith.bits import keep_bits
from tsqp.model.batch import Batch, Chunk
from tsqp.model.cache import KVCache
from tsqp.model.decoder_layers import ChunkWork, DecoderLayers
from tsqp.model.operators import Embedding
from tsqp.model.pending import Steps, interleaved
from tsqp.model.rotary import Rotary
from tsqp.trusted.stats import Stats


class Decoder:
    """The forward pass. ``max_rows`` bounds the rows of a chunk; each chunk crosses the layers as ``micro_batches``."""

    def __init__(
        self,
        layers: DecoderLayers,
        embedding: Embedding,
        *,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
        max_rows: int,
        micro_batches: int,
        stats: Stats,
    ) -> None:
        self.config = layers.config
        self._layers = layers
        self._embedding = embedding
        self._cache_dtype = cache_dtype
        self._rotary = Rotary(self.config.rope, self.config.head_dim, dtype)
        self._max_rows = max_rows
        self._micro_batches = micro_batches
        self._stats = stats

    def new_cache(self) -> KVCache:
        """An empty cache for one sequence."""
        return KVCache(self.config, self._cache_dtype)

    def forward(self, batch: Batch[KVCache]) -> Steps[torch.Tensor]:
        """Logits, float32 (n, vocab_size), of the last row of each sampled sequence; of all T rows for ``every_row``.

        Appends to the caches. After an exception the caches are not advanced, so the pass can be asked for again.
        """
        hidden = yield self._embedding.start(batch.flat_tokens())  # (T, hidden)
        wanted: list[torch.Tensor] = []
        for chunk in batch.chunks(self._max_rows):
            parts = chunk.split(self._micro_batches)
            yield from interleaved([self._through_layers(hidden[part.slice], part) for part in parts])
            rows = hidden[chunk.slice]
            wanted.append(rows if batch.every_row else rows[chunk.last_rows()])
            self._stats.chunks += 1
            self._stats.micro_batches = max(self._stats.micro_batches, len(parts))
        last = torch.cat(wanted)
        if not len(last):  # parts of prompts alone
            batch.advance()
            self._stats.forward_passes += 1
            return last.new_empty(0, self.config.vocab_size, dtype=torch.float32)
        final = self._layers.linears.input(("lm_head", None), len(last))
        with self._stats.operator("rms_norm"):
            self._layers.kernels.rms_norm(last, self._layers.norms.final, self.config.rms_norm_eps, final)
        asked = self._layers.linears.start(("lm_head", None), final)
        logits = (yield asked).to(torch.float32, copy=True)  # the caller's own: what was handed out is used again
        asked.release()
        batch.advance()
        self._stats.forward_passes += 1
        return logits

    def _through_layers(self, hidden: torch.Tensor, chunk: Chunk[KVCache]) -> Steps[None]:
        with self._stats.operator("rotary"):
            work = ChunkWork.of(self._rotary, self.config, chunk)
            keep_bits(hidden)
        for layer in range(self.config.num_layers):
            yield from self._layers.steps(layer, hidden, chunk, work)
