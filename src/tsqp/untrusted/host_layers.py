"""Forward passes in the memory of the host, by the loops that a trusted side has too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F

from tsqp.model.batch import Batch
from tsqp.model.cache import KVCache, Positions
from tsqp.model.decoder_layers import DecoderLayers
from tsqp.model.kernels import pick_kernels
from tsqp.model.local import LocalLinears, pick_attention
from tsqp.model.meter import Unmetered
from tsqp.model.pending import run
from tsqp.model.rotary import Rotary
from tsqp.model.weights import ModelWeights


class ZeroedCache(KVCache):
    """What nobody has stored is zero, as in a device's pages.

    A client chooses which layers of which chunks it asks for, in any order, and its next pass attends to all positions
    before it. In free memory of this process lies what was computed for others.
    """

    def _memory_like(self, old: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return old.new_zeros(shape)


class HostLayers:
    """See LayerCompute."""

    def __init__(self, weights: ModelWeights) -> None:
        config, dtype = weights.config, weights.dtype
        self.weights = weights
        self.rotary = Rotary(config, dtype)
        self.block = DecoderLayers(
            config,
            weights.norms,
            LocalLinears(weights.groups, Unmetered()),
            pick_attention(config.windows, dtype, Unmetered(), scale=config.score_scale, cap=config.score_cap),
            pick_kernels(dtype, activation=config.activation, layer_norm=config.layer_norm),
            Unmetered(),
        )

    def new_cache(self) -> ZeroedCache:
        """See LayerCompute."""
        return ZeroedCache(self.weights.config, self.weights.dtype)

    def release(self, cache: Positions) -> None:
        """See LayerCompute: its memory goes with it."""

    def bytes_for(self, lengths: Iterable[int]) -> int:
        """See LayerCompute."""
        return sum(map(self.new_cache().bytes_for, lengths))

    def begin(self, tokens: torch.Tensor, batch: Batch[Positions], max_rows: int) -> HostPass:
        """See LayerCompute."""
        return HostPass(self, tokens, cast("Batch[KVCache]", batch), max_rows)


class HostPass:
    """See PassCompute: hidden states (T, hidden_size) of the compute dtype."""

    def __init__(self, layers: HostLayers, tokens: torch.Tensor, batch: Batch[KVCache], max_rows: int) -> None:
        self._layers, self._block = layers, layers.block
        self._chunks = list(batch.chunks(max_rows))
        self._work = [self._block.work(layers.rotary, chunk) for chunk in self._chunks]
        self._hidden = self._block.embedded(F.embedding(tokens, layers.weights.embedding))
        self.chunks = len(self._chunks)

    def layer(self, layer: int, chunk: int) -> None:
        """See PassCompute."""
        own = self._chunks[chunk]
        run(self._block.steps([layer], self._hidden[own.slice], own, self._work[chunk]))

    def logits(self, *, every_row: bool) -> torch.Tensor:
        """See PassCompute."""
        hidden, weights = self._hidden, self._layers.weights
        if not every_row:
            last = [chunk.offset + row for chunk in self._chunks for row in chunk.wanted_rows()]
            hidden = hidden.index_select(0, torch.tensor(last))
        return final_logits(self._block, weights, hidden)


def final_logits(block: DecoderLayers, weights: ModelWeights, hidden: torch.Tensor) -> torch.Tensor:
    """Final norm and LM head of hidden states (n, hidden_size): (n, vocab_size), without a cap."""
    final = torch.empty_like(hidden)
    block.norm(hidden, weights.norms.final, final)
    return weights.groups["lm_head", None].product(final)
