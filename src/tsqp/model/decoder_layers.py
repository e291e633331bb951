"""The layers of a Llama-family model, as a computation that hands out its products.

Both sides run this: the trusted side with products on a worker, a worker that holds whole layers with its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from tsqp.arith.bits import keep_bits
from tsqp.checkpoint.base import Checkpoint
from tsqp.checkpoint.shapes import FINAL_NORM, norm_names
from tsqp.config.groups import GroupKey
from tsqp.config.model import ModelConfig
from tsqp.model.batch import Chunk
from tsqp.model.cache import KVCache, query_dtype
from tsqp.model.kernels import Heads, Kernels
from tsqp.model.meter import Meter
from tsqp.model.operators import Attention, ChunkAttention, Linears
from tsqp.model.pending import CACHE_BARRIER, Pending, Steps
from tsqp.model.rotary import Rotary

if TYPE_CHECKING:
    from tsqp.model.adapters import Adapters, ChunkAdapters


class ChunkWork(NamedTuple):
    """What one chunk needs in every layer, made once: cos and sin of its positions, and room for its queries.

    cos and sin (ropes, T, D) have a table for each rotary embedding of the model; ``tables`` are the same, one by one.
    ``q`` (heads, T, D) is of the dtype that attention over the caches takes. ``adapters``: what is added to products of
    these rows; None where no row has an adapter.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    tables: Sequence[tuple[torch.Tensor, torch.Tensor]]
    q: torch.Tensor
    attention: ChunkAttention
    adapters: ChunkAdapters | None = None

    def adapted(self, key: GroupKey, x: torch.Tensor | None, product: torch.Tensor) -> torch.Tensor:
        """A product of x with what the rows' adapters add to it; x may be None where no row has one."""
        return product if self.adapters is None or x is None else self.adapters.added(key, x, product)


@dataclass(frozen=True)
class LayerNorms:
    """The norm weights of one layer, None where the family has none.

    ``attention`` and ``mlp`` (hidden_size,): of what the two take; ``attention_after`` and ``mlp_after`` of what they
    give. ``q`` and ``k``: (head_dim,), (heads, head_dim) where each head has its own, or (q_size,) and (kv_size,) where
    all heads are normed as one.
    """

    attention: torch.Tensor | None
    mlp: torch.Tensor | None
    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    attention_after: torch.Tensor | None = None
    mlp_after: torch.Tensor | None = None


@dataclass(frozen=True)
class Norms:
    """All norm weights of a model, in the compute dtype.

    The final one carries what the logits are multiplied by: the head, which follows, is linear.
    """

    layers: tuple[LayerNorms, ...]
    final: torch.Tensor

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str = "cpu") -> Norms:
        """Read them from a checkpoint. Raises CorruptCheckpoint."""
        config = checkpoint.config

        def weight(name: str, factor: float = 1.0) -> torch.Tensor:
            stored = checkpoint.tensor(name)
            if (factor, config.norm_offset) != (1.0, 0.0):
                stored = (stored.float() + config.norm_offset) * factor
            return keep_bits(stored.to(device, dtype, copy=True))

        def layer(index: int) -> LayerNorms:
            names = norm_names(config, index)
            return LayerNorms(
                **dict.fromkeys(("attention", "mlp")) | {key: weight(name) for key, name in names.items()}
            )

        layers = tuple(layer(index) for index in range(config.num_layers))
        return cls(layers, weight(FINAL_NORM, config.logits_multiplier))


@dataclass(frozen=True)
class DecoderLayers:
    """The layers of one model: the same code for each, its weights by index.

    ``adapters``: those that rows may have; None where there are none.
    """

    config: ModelConfig
    norms: Norms
    linears: Linears
    attention: Attention
    kernels: Kernels
    meter: Meter
    adapters: Adapters | None = None

    def work(self, rotary: Rotary, chunk: Chunk[KVCache], positions: torch.Tensor | None = None) -> ChunkWork:
        """What ``steps`` takes for a chunk. ``positions`` (T,): those of the chunk unless given."""
        positions = chunk.positions() if positions is None else positions
        cos, sin = rotary.tables(positions, chunk.lengths(positions))
        shape = (self.config.num_heads, cos.shape[1], self.config.head_dim)
        q = cos.new_empty(shape, dtype=query_dtype(chunk.spans[0].cache.dtype))
        tables = [(keep_bits(of_rope), keep_bits(sines)) for of_rope, sines in zip(cos, sin, strict=True)]
        adapters = None if self.adapters is None else self.adapters.of(chunk.spans)
        return ChunkWork(keep_bits(cos), keep_bits(sin), tables, keep_bits(q), self.attention.of(chunk), adapters)

    def embedded(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the layers take of what the embedding gives, (T, hidden_size), which may be changed."""
        multiplier = self.config.embedding_multiplier
        if self.config.rounded_multiplier:
            return hidden.mul_(torch.tensor(multiplier, dtype=hidden.dtype))
        return hidden if multiplier == 1.0 else hidden.mul_(multiplier)

    def norm(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """The norm of the family: x and out (T, n), weight (n,)."""
        norm = self.kernels.layer_norm if self.config.layer_norm else self.kernels.rms_norm
        with self.meter.operator("rms_norm"):
            norm(x, weight, self.config.rms_norm_eps, out)

    def steps(self, layers: Sequence[int], hidden: torch.Tensor, chunk: Chunk[KVCache], work: ChunkWork) -> Steps[None]:
        """Put the rows of one chunk through layers, one after another: ``hidden`` (T, hidden_size) is changed in place.

        Appends to the caches of the chunk's sequences at the positions of their rows.
        """
        rows = hidden.shape[0]
        asked: Pending | None = None  # between layers: a product that is still to be added to hidden
        fed: torch.Tensor | None = None  # its input, where adapters need it
        for layer in layers:
            norms, before = self.norms.layers[layer], self.norms.layers[max(layer - 1, 0)]
            if asked is None:
                x = self._normed(("qkv", layer), hidden, norms.attention)
            else:
                y = work.adapted(("down", layer - 1), fed, (yield asked))
                x = self._added(("qkv", layer), hidden, y, before.mlp_after, norms.attention)
                del y
                asked.release()
            asked = self.linears.start(("qkv", layer), x)
            qkv = work.adapted(("qkv", layer), x, (yield asked))
            yield CACHE_BARRIER  # earlier rows of a sequence may be another computation's: their keys come first
            mixed = self.linears.input(("o", layer), rows)
            yield from self._attend(layer, qkv, chunk, work, mixed)
            del qkv, x  # the memory of large ones is free again when nothing refers to it
            asked.release()
            asked = self.linears.start(("o", layer), mixed)
            y = work.adapted(("o", layer), mixed, (yield asked))
            if self.config.parallel:
                x = self._normed(("gate_up", layer), hidden, norms.attention)  # the same that attention has taken
                hidden.add_(y)
            else:
                x = self._added(("gate_up", layer), hidden, y, norms.attention_after, norms.mlp)
            del mixed, y
            asked.release()
            asked = self.linears.start(("gate_up", layer), x)
            gate_up = work.adapted(("gate_up", layer), x, (yield asked))
            inner = self.linears.input(("down", layer), rows)
            with self.meter.operator("silu"):
                self._activate(gate_up, inner)
            del gate_up, x
            asked.release()
            asked = self.linears.start(("down", layer), inner)
            fed = None if work.adapters is None else inner
            del inner
        if asked is not None:
            y = work.adapted(("down", layers[-1]), fed, (yield asked))
            hidden.add_(self._normed_after(y, self.norms.layers[layers[-1]].mlp_after))
            asked.release()

    def _normed(self, key: GroupKey, hidden: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """The input of a product: ``hidden``, normed where the family norms it."""
        x = self.linears.input(key, hidden.shape[0])
        if weight is None:
            return x.copy_(hidden)
        self.norm(hidden, weight, x)
        return x

    def _added(
        self,
        key: GroupKey,
        hidden: torch.Tensor,
        y: torch.Tensor,
        after: torch.Tensor | None,
        before: torch.Tensor | None,
    ) -> torch.Tensor:
        """The same after ``hidden += y``, with y normed by ``after`` and the sum by ``before`` where there are any."""
        y = self._normed_after(y, after)
        if before is None or self.config.layer_norm:
            hidden.add_(y)
            return self._normed(key, hidden, before)
        x = self.linears.input(key, hidden.shape[0])
        with self.meter.operator("rms_norm"):
            self.kernels.add_rms_norm(hidden, y, before, self.config.rms_norm_eps, x)
        return x

    def _normed_after(self, y: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """What attention or MLP has given, (T, hidden_size), normed where the family norms it."""
        if weight is None:
            return y
        normed = torch.empty_like(y)
        self.norm(y, weight, normed)
        return normed

    def _activate(self, gate_up: torch.Tensor, inner: torch.Tensor) -> None:
        """The activation of (T, 2·inner), or of (T, inner) where nothing is gated."""
        match self.config.activation:
            case "silu":
                self.kernels.silu_mul(gate_up, inner)
            case "gelu_tanh":
                self.kernels.gelu_mul(gate_up, inner)
            case "relu2":
                self.kernels.relu_squared(gate_up, inner)

    def _attend(
        self, layer: int, qkv: torch.Tensor, chunk: Chunk[KVCache], work: ChunkWork, mixed: torch.Tensor
    ) -> Steps[None]:
        """Attention of every sequence of the chunk: qkv (T, q + 2·kv) to mixed (T, heads·head_dim)."""
        config, q, attention = self.config, work.q, work.attention
        cos, sin = work.tables[config.rope_index(layer)]
        queries, keys = self._queries_and_keys(layer, qkv)
        values = Heads(qkv, config.q_size + config.kv_size)
        with self.meter.operator("rotary"):
            # All keys before any attention, which may have to wait for products.
            self.kernels.store(layer, queries, keys, values, cos, sin, q, chunk.spans)
        yield from attention.steps(layer, q, mixed)

    def _queries_and_keys(self, layer: int, qkv: torch.Tensor) -> tuple[Heads, Heads]:
        """Normed where the family norms them."""
        config, norms = self.config, self.norms.layers[layer]
        if norms.q is None or norms.k is None:
            return Heads(qkv, 0), Heads(qkv, config.q_size)
        queries = self._norm_heads(qkv[:, : config.q_size], norms.q)
        keys = self._norm_heads(qkv[:, config.q_size : config.q_size + config.kv_size], norms.k)
        return Heads(queries, 0), Heads(keys, 0)

    def _norm_heads(self, heads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Every head of (T, n·head_dim) normed, or all as one; ``weight`` as in ``LayerNorms``."""
        rows = heads.reshape(-1, weight.shape[-1])  # (T·n, D), or (T, n·D)
        normed = torch.empty_like(rows)
        if weight.dim() == 1:
            self.norm(rows, weight, normed)
            return normed.view(heads.shape)
        self.norm(rows, torch.ones_like(weight[0]), normed)
        return (normed.view(len(heads), *weight.shape) * weight).view(heads.shape)
