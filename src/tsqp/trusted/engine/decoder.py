"""A Llama-family decoder that asks for its products and does not know where they are computed.

A partition is a choice of the ``Embedding``, ``Linears`` and ``Attention`` objects it is given. One code path serves
prefill, decode, chunks, micro-batches and batches: flat rows, each with a position, and a cache per sequence.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch

from tsqp.arith.bits import keep_bits
from tsqp.arith.large_memory import large_memory
from tsqp.model.batch import Batch, Chunk, SequenceRows
from tsqp.model.cache import KVCache
from tsqp.model.decoder_layers import ChunkWork, DecoderLayers
from tsqp.model.norms import soft_capped
from tsqp.model.operators import Embedding
from tsqp.model.pending import Steps, interleaved
from tsqp.model.rotary import Rotary
from tsqp.trusted.engine.micro_batches import MicroBatches
from tsqp.trusted.stats import Stats


class Step(Protocol):
    """Takes few rows through all layers in one piece, where it can. ``most_rows``: so many at most."""

    most_rows: int

    def serves(self, wanted: Sequence[int]) -> bool:
        """Whether it takes rows of which these are to have logits."""

    def run(
        self, hidden: torch.Tensor, spans: Sequence[SequenceRows[KVCache]], wanted: Sequence[int], work: ChunkWork
    ) -> torch.Tensor:
        """Logits, float32 (n, vocab_size), of the rows ``wanted`` of hidden (T, hidden_size), which is changed."""


class Decoder:
    """The forward pass. ``max_rows`` bounds the rows of a chunk; ``micro_batches`` says in how many parts each crosses
    the layers.
    """

    def __init__(
        self,
        layers: DecoderLayers,
        embedding: Embedding,
        *,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
        max_rows: int,
        micro_batches: MicroBatches,
        stats: Stats,
        step: Step | None = None,
    ) -> None:
        self.config = layers.config
        self._layers = layers
        self._embedding = embedding
        self._cache_dtype = cache_dtype
        self._rotary = Rotary(self.config, dtype)
        self._max_rows = max_rows
        self._micro_batches = micro_batches
        self._stats = stats
        self._step = step

    def new_cache(self) -> KVCache:
        """An empty cache for one sequence."""
        return KVCache(self.config, self._cache_dtype)

    def forward(self, batch: Batch[KVCache]) -> Steps[torch.Tensor]:
        """Logits, float32 (n, vocab_size), of the rows that are wanted, in their order; of all T for ``every_row``.

        Appends to the caches. After an exception the caches are not advanced, so the pass can be asked for again.
        """
        hidden = self._layers.embedded((yield self._embedding.start(batch.flat_tokens())))  # (T, hidden)
        step = None if batch.call_by_call or self._micro_batches.parts(len(hidden)) > 1 else self._step
        if step is not None and len(hidden) <= min(step.most_rows, self._max_rows):
            (chunk,) = batch.chunks(self._max_rows)
            rows = _wanted(chunk, batch)
            if step.serves(rows):
                logits = step.run(hidden, chunk.spans, rows, self._layers.work(self._rotary, chunk))
                self._stats.chunks += 1
                batch.advance()
                self._stats.forward_passes += 1
                return logits
        wanted: list[torch.Tensor] = []
        for chunk in batch.chunks(self._max_rows):
            parts = chunk.split(self._micro_batches.parts(chunk.rows))
            began = time.perf_counter()
            yield from interleaved([self._through_layers(hidden[part.slice], part) for part in parts])
            self._micro_batches.took(chunk.rows, len(parts), time.perf_counter() - began)
            rows = _wanted(chunk, batch)
            own = hidden[chunk.slice]
            wanted.append(own if len(rows) == chunk.rows else own[rows])
            self._stats.chunks += 1
            self._stats.micro_batches = max(self._stats.micro_batches, len(parts))
        last = wanted[0] if len(wanted) == 1 else torch.cat(wanted)
        if not len(last):  # parts of prompts alone
            batch.advance()
            self._stats.forward_passes += 1
            return last.new_empty(0, self.config.vocab_size, dtype=torch.float32)
        final = self._layers.linears.input(("lm_head", None), len(last))
        self._layers.norm(last, self._layers.norms.final, final)
        asked = self._layers.linears.start(("lm_head", None), final)
        product = yield asked
        logits = torch.empty(product.shape, dtype=torch.float32)  # the caller's own: what was handed out is used again
        self._layers.kernels.widen(product, logits)
        del product
        asked.release()
        batch.advance()
        large_memory().give_back()  # the next pass is likely to be one of few rows
        self._stats.forward_passes += 1
        return soft_capped(logits, self.config.logits_cap)

    def _through_layers(self, hidden: torch.Tensor, chunk: Chunk[KVCache]) -> Steps[None]:
        with self._stats.operator("rotary"):
            work = self._layers.work(self._rotary, chunk)
            keep_bits(hidden)
        yield from self._layers.steps(range(self.config.num_layers), hidden, chunk, work)


def _wanted(chunk: Chunk[KVCache], batch: Batch[KVCache]) -> list[int]:
    """The rows of a chunk whose logits are wanted."""
    return [*range(chunk.rows)] if batch.every_row else chunk.wanted_rows()
