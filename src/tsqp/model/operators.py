"""What a block needs and does not compute itself. Where these run is what a partition decides."""

from __future__ import annotations

from typing import Protocol

import torch

from tsqp.config.groups import GroupKey
from tsqp.model.batch import Chunk
from tsqp.model.cache import KVCache
from tsqp.model.pending import Pending, Steps


class Linears(Protocol):
    """All linear layers of a model."""

    def input(self, key: GroupKey, rows: int) -> torch.Tensor:
        """Memory for the input of one product, (rows, in_features): filled and given to ``start``, it is not copied."""

    def start(self, key: GroupKey, x: torch.Tensor) -> Pending:
        """Ask for ``x Wᵀ + b`` of one group: x (T, in_features) to (T, out_features), parts concatenated.

        ``x`` must not change until the product is there. Product and ``x`` are good until nothing refers to them any
        more, or until the product is released (``Pending.release``): then they may be memory of the next products.
        """


class Embedding(Protocol):
    """The embedding of a model."""

    def start(self, tokens: torch.Tensor) -> Pending:
        """Ask for the hidden states of int64 token ids (T,): (T, hidden_size), the caller's to change."""


class Attention(Protocol):
    """Causal attention, of each row over the cache of its sequence."""

    def of(self, chunk: Chunk[KVCache]) -> ChunkAttention:
        """Attention of the rows of one chunk, in every layer."""


class ChunkAttention(Protocol):
    """Attention of the rows of one chunk. What its layers share is made once."""

    def steps(self, layer: int, q: torch.Tensor, out: torch.Tensor) -> Steps[None]:
        """q (heads, T, head_dim) of the chunk's rows to out (T, heads·head_dim); the caches already hold their keys.

        q has the dtype of the caches, or float32 where they hold int8.
        """
