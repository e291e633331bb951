"""A Llama-family decoder that asks for its products and does not know where they are computed.

A partition is a choice of the ``Embedding``, ``Linears`` and ``Attention`` objects it is given. One code path serves
prefill, decode, chunks and batches: flat rows, each with a position, and a cache per sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tsqp.checkpoint.base import Checkpoint
from tsqp.model.norms import rms_norm, silu_mul
from tsqp.model.rotary import Rotary, rotate
from tsqp.spec.model import ModelSpec
from tsqp.trusted.attention import Attention
from tsqp.trusted.batch import Batch, Chunk
from tsqp.trusted.embedding import Embedding
from tsqp.trusted.linears import Linears
from tsqp.trusted.pending import Steps
from tsqp.trusted.stats import Stats

RotaryTables = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class LayerNorms:
    """The norm weights of one layer: (hidden_size,) twice, and (head_dim,) for Q and K where the family has them."""

    attention: torch.Tensor
    mlp: torch.Tensor
    q: torch.Tensor | None
    k: torch.Tensor | None


@dataclass(frozen=True)
class Norms:
    """All norm weights of a model, in the compute dtype."""

    layers: tuple[LayerNorms, ...]
    final: torch.Tensor

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype) -> Norms:
        """Read them from a checkpoint. Raises CorruptCheckpoint."""

        def weight(name: str) -> torch.Tensor:
            return checkpoint.tensor(f"model.{name}.weight").to(dtype, copy=True)

        def layer(index: int) -> LayerNorms:
            name = f"layers.{index}"
            qk = checkpoint.spec.qk_norm
            return LayerNorms(
                attention=weight(f"{name}.input_layernorm"),
                mlp=weight(f"{name}.post_attention_layernorm"),
                q=weight(f"{name}.self_attn.q_norm") if qk else None,
                k=weight(f"{name}.self_attn.k_norm") if qk else None,
            )

        return cls(tuple(layer(index) for index in range(checkpoint.spec.num_layers)), weight("norm"))


class Decoder:
    """The forward pass. ``max_rows`` bounds the rows of a chunk."""

    def __init__(
        self,
        spec: ModelSpec,
        norms: Norms,
        embedding: Embedding,
        linears: Linears,
        attention: Attention,
        *,
        dtype: torch.dtype,
        max_rows: int,
        stats: Stats,
    ) -> None:
        self.spec = spec
        self.dtype = dtype
        self._norms = norms
        self._embedding = embedding
        self._linears = linears
        self._attention = attention
        self._rotary = Rotary(spec.rope, spec.head_dim, dtype)
        self._max_rows = max_rows
        self._stats = stats

    def forward(self, batch: Batch) -> Steps[torch.Tensor]:
        """Logits, float32 (sequences, vocab_size), of each sequence's last row; of all T rows for ``every_row``.

        Appends to the caches. After an exception the caches are not advanced, so the pass can be asked for again.
        """
        embedded = yield self._embedding.start(batch.flat_tokens())  # (T, hidden)
        wanted: list[torch.Tensor] = []
        for chunk in batch.chunks(self._max_rows):
            hidden = embedded[chunk.offset : chunk.offset + chunk.rows]
            hidden = yield from self._layers(hidden, chunk)
            wanted.append(hidden if batch.every_row else hidden[chunk.last_rows()])
            self._stats.chunks += 1
        final = self._norm(torch.cat(wanted), self._norms.final)
        logits = yield self._linears.start(("lm_head", None), final)
        for tokens, cache in zip(batch.tokens, batch.caches, strict=True):
            cache.advance(len(tokens))
        self._stats.forward_passes += 1
        return logits.float()

    def _layers(self, hidden: torch.Tensor, chunk: Chunk) -> Steps[torch.Tensor]:
        with self._stats.operator("rotary"):
            tables = self._rotary.tables(chunk.positions())
        for layer in range(self.spec.num_layers):
            hidden = yield from self._block(layer, hidden, chunk, tables)
        return hidden

    def _block(self, layer: int, hidden: torch.Tensor, chunk: Chunk, tables: RotaryTables) -> Steps[torch.Tensor]:
        norms = self._norms.layers[layer]
        x = self._norm(hidden, norms.attention)
        qkv = yield self._linears.start(("qkv", layer), x)
        mixed = yield from self._attend(layer, qkv, chunk, tables)
        hidden = hidden + (yield self._linears.start(("o", layer), mixed))
        x = self._norm(hidden, norms.mlp)
        gate_up = yield self._linears.start(("gate_up", layer), x)
        with self._stats.operator("silu"):
            inner = silu_mul(gate_up)
        return hidden + (yield self._linears.start(("down", layer), inner))

    def _attend(self, layer: int, qkv: torch.Tensor, chunk: Chunk, tables: RotaryTables) -> Steps[torch.Tensor]:
        """Attention of every sequence of the chunk: qkv (T, q + 2·kv) to (T, heads·head_dim)."""
        spec, norms = self.spec, self._norms.layers[layer]
        q, k, v = qkv.split((spec.q_size, spec.kv_size, spec.kv_size), dim=-1)
        q = q.view(-1, spec.num_heads, spec.head_dim)  # (T, H, D)
        k = k.view(-1, spec.num_kv_heads, spec.head_dim)  # (T, KV, D)
        v = v.view(-1, spec.num_kv_heads, spec.head_dim)
        if norms.q is not None and norms.k is not None:
            q, k = self._norm(q, norms.q), self._norm(k, norms.k)
        with self._stats.operator("rotary"):
            q, k = rotate(q, *tables), rotate(k, *tables)
        mixed = torch.empty(q.shape, dtype=self.dtype)
        for span in chunk.spans:
            span.cache.append(layer, k[span.slice], v[span.slice], span.position)
            mixed[span.slice] = yield from self._attention.steps(layer, q[span.slice], span)
        return mixed.view(-1, spec.q_size)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with self._stats.operator("rms_norm"):
            return rms_norm(x, weight, self.spec.rms_norm_eps)
