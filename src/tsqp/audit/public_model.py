"""The first layers of a checkpoint, as anybody who has the public weights can run them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F

from tsqp.checkpoint.base import Checkpoint
from tsqp.checkpoint.shapes import EMBEDDING
from tsqp.config.groups import LAYER_GROUPS
from tsqp.config.model import ModelConfig
from tsqp.model.attention import masked_softmax, score_product, value_product
from tsqp.model.batch import Chunk, SequenceRows
from tsqp.model.cache import KVCache
from tsqp.model.decoder_layers import DecoderLayers, Norms
from tsqp.model.kernels import pick_kernels
from tsqp.model.linear import load_group
from tsqp.model.local import LocalLinears
from tsqp.model.pending import Steps, run
from tsqp.model.rotary import Rotary
from tsqp.trusted.stats import Stats

BLOCK_TOKENS = 512  # of the vocabulary at a time


class PublicModel:
    """Layers 0 to ``depth`` - 1 in float32, for one text that is known so far and any number of ways to go on."""

    def __init__(self, checkpoint: Checkpoint, depth: int) -> None:
        self.config = checkpoint.config
        self.depth = depth
        self._embedding = checkpoint.tensor(EMBEDDING)
        self._norms = Norms.load(checkpoint, torch.float32)
        self._rotary = Rotary(self.config, torch.float32)
        keys = [(name, layer) for layer in range(depth) for name in LAYER_GROUPS]
        linears = LocalLinears({key: load_group(checkpoint, key, torch.float32) for key in keys}, Stats())
        kernels = pick_kernels(torch.float32, compiled=False)
        nothing = _Visible(torch.empty(0, 0), torch.empty(0), torch.empty(0), self.config)
        self._block = DecoderLayers(self.config, self._norms, linears, nothing, kernels, Stats())

    def first_inputs(self) -> Iterator[tuple[int, torch.Tensor]]:
        """What each token of the vocabulary is at the input of layer 0, of length 1.

        A block at a time, so that nobody needs memory for all: its first token, and (tokens, hidden_size).
        """
        for ids in self._vocabulary():
            yield int(ids[0]), self._normed(self._embedded(ids), 0)

    def deep_inputs(self, context: KVCache) -> torch.Tensor:
        """What each token of the vocabulary is at the input of layer ``depth``, as the next after ``context``."""
        return torch.cat([self.next_inputs(context, ids) for ids in self._vocabulary()])

    def read(self, tokens: torch.Tensor) -> KVCache:
        """The context of a text, int64 (T,)."""
        context = KVCache(self.config, torch.float32)
        if len(tokens):
            self._through(context, tokens, torch.arange(len(tokens)), torch.ones(len(tokens), len(tokens)).tril())
            context.advance(len(tokens))
        return context

    def next_inputs(self, context: KVCache, candidates: torch.Tensor) -> torch.Tensor:
        """Input of layer ``depth``, of length 1, for each candidate (C,) as the next token: (C, hidden_size).

        All go through the layers together, at one position, none visible to another; ``take`` keeps one.
        """
        known, count = context.length, len(candidates)
        visible = torch.cat((torch.ones(count, known), torch.eye(count)), dim=1)
        return self._normed(self._through(context, candidates, torch.full((count,), known), visible), self.depth)

    def take(self, context: KVCache, index: int) -> None:
        """The candidate ``index`` of the last ``next_inputs`` is the next token of the text."""
        for layer in range(self.depth):
            for held in context.view(layer, context.length, context.length + index + 1):
                held[:, 0] = held[:, index]
        context.advance(1)

    def _through(
        self, context: KVCache, tokens: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states (T, hidden_size) after the layers; ``visible`` (T, known + T) is 1 where a row may look."""
        hidden = self._embedded(tokens)
        span = SequenceRows(context, context.length, 0, len(tokens), last=True)
        keys = torch.cat((torch.arange(context.length), positions))
        block = replace(self._block, attention=_Visible(visible, positions, keys, self.config))
        chunk = Chunk(0, (span,))
        run(block.steps(range(self.depth), hidden, chunk, block.work(self._rotary, chunk, positions)))
        return hidden

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._block.embedded(self._embedding[tokens].float())

    def _normed(self, hidden: torch.Tensor, layer: int) -> torch.Tensor:
        """As layer ``layer`` hands it to its first product, of length 1."""
        weight = self._norms.layers[layer].attention
        normed = hidden if weight is None else torch.empty_like(hidden)
        if weight is not None:
            self._block.norm(hidden, weight, normed)
        return F.normalize(normed, dim=1)

    def _vocabulary(self) -> Iterator[torch.Tensor]:
        for first in range(0, self.config.vocab_size, BLOCK_TOKENS):
            yield torch.arange(first, min(first + BLOCK_TOKENS, self.config.vocab_size))


class _Visible:
    """Attention where ``visible`` says, and within the layer's window."""

    def __init__(self, visible: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, config: ModelConfig) -> None:
        self._visible = visible.bool()
        self._distance = queries.unsqueeze(1) - keys.unsqueeze(0)
        self._windows, self._scale, self._cap = config.windows, config.attention_scale, config.score_cap

    def of(self, chunk: Chunk[KVCache]) -> _Visible:
        (self._span,) = chunk.spans
        return self

    def steps(self, layer: int, q: torch.Tensor, out: torch.Tensor) -> Steps[None]:
        k, v = self._span.cache.view(layer, 0, self._span.end)
        window = self._windows[layer]
        mask = self._visible if window is None else self._visible & (self._distance < window)
        if self._cap is not None:
            mixed = value_product(masked_softmax(score_product(q * self._scale, k), mask, self._cap), v)
        else:
            (mixed,) = F.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=mask, enable_gqa=len(q) != len(k), scale=self._scale
            )
        out.view(len(out), len(q), -1).copy_(mixed.transpose(0, 1))
        return
        yield  # a generator that hands out no products
