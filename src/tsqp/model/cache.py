"""The KV cache of one sequence. It lives where attention is computed and grows with the text."""

from __future__ import annotations

import torch

from tsqp.config.model import ModelConfig

GROW_ROWS = 256
BLOCK_QUERIES = 128  # capacities are multiples of it: attention may read whole blocks of keys


class Positions:
    """A sequence that grows: ``length`` positions of it are held."""

    def __init__(self) -> None:
        self.length = 0

    def advance(self, rows: int) -> None:
        """Now ``rows`` more positions are held."""
        self.length += rows


class KVCache(Positions):
    """Keys and values of every layer, (kv_heads, capacity, head_dim) each; capacity grows by doubling.

    What was never written is zero, so that a block that reaches past the end holds finite numbers.

    ``length`` is the number of positions that every layer holds; a forward pass reserves and fills layer by layer and
    then calls ``advance``.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.dtype = dtype
        self.kv_heads = config.num_kv_heads
        self._max_positions = config.max_positions
        empty = torch.empty(config.num_kv_heads, 0, config.head_dim, dtype=dtype, device=device)
        self._keys = [empty] * config.num_layers
        self._values = [empty] * config.num_layers
        self._places = [(0, 0, 0)] * config.num_layers

    def reserve(self, layer: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, (kv_heads, capacity, head_dim), with room for positions up to ``end``."""
        keys = self._keys[layer]
        if end > keys.shape[1]:
            keys = self._keys[layer] = self._grown(keys, end)
            values = self._values[layer] = self._grown(self._values[layer], end)
            self._places[layer] = keys.data_ptr(), values.data_ptr(), keys.stride(0)
        return keys, self._values[layer]

    def place(self, layer: int) -> tuple[int, int, int]:
        """For loops that reach many caches: addresses of keys and of values, and elements from head to head.

        Good until the layer grows, and for as long as this cache is there.
        """
        return self._places[layer]

    def view(self, layer: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of positions first to end: (kv_heads, end - first, head_dim) each, not copied."""
        return self._keys[layer][:, first:end], self._values[layer][:, first:end]

    def _grown(self, old: torch.Tensor, needed: int) -> torch.Tensor:
        capacity = old.shape[1]
        capacity = min(max(needed + GROW_ROWS, 2 * capacity), max(needed, self._max_positions))
        capacity = -(-capacity // BLOCK_QUERIES) * BLOCK_QUERIES
        new = old.new_zeros(old.shape[0], capacity, old.shape[2])
        new[:, : old.shape[1]] = old
        return new
