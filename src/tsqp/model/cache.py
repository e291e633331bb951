"""The KV cache of one sequence. It lives where attention is computed and grows with the text.

Keys and values are of one float dtype, or int8 with a float32 scale for each position and KV head, as
``tsqp.arith.quantise`` has them: what is kept is integer · scale.
"""

from __future__ import annotations

import numpy as np
import torch

from tsqp.arith.bits import Array, keep_bits
from tsqp.config.dtype import KVDtype
from tsqp.config.model import ModelConfig
from tsqp.wire.payload import TORCH_DTYPES

GROW_ROWS = 256


def cache_dtype(kept: KVDtype) -> torch.dtype:
    """The dtype of a cache, by its name."""
    return torch.int8 if kept == "int8" else TORCH_DTYPES[kept]


class Positions:
    """A sequence that grows: ``length`` positions of it are held."""

    def __init__(self) -> None:
        self.length = 0

    def advance(self, rows: int) -> None:
        """Now ``rows`` more positions are held."""
        self.length += rows


def query_dtype(kept: torch.dtype) -> torch.dtype:
    """What queries are that attend to a cache of ``kept``: the same floats, float32 where it holds integers."""
    return torch.float32 if kept == torch.int8 else kept


class KVCache(Positions):
    """Keys and values of every layer, (kv_heads, capacity, head_dim) each; capacity grows by doubling.

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
        scales = torch.empty(empty.shape[:2], dtype=torch.float32, device=device)
        self._scales = [(scales, scales)] * config.num_layers  # of keys and of values; empty where those are floats
        self._memory: list[tuple[int, ...]] = [(0, 0, 0)] * config.num_layers
        self._addresses: Array | None = None

    def reserve(self, layer: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, (kv_heads, capacity, head_dim), with room for positions up to ``end``."""
        if end > self._keys[layer].shape[1]:
            keys, values = self._grown(self._keys[layer], end), self._grown(self._values[layer], end)
            self._keys[layer], self._values[layer] = keys, values
            self._memory[layer] = keys.data_ptr(), values.data_ptr(), keys.stride(0) * keys.itemsize
            if self.dtype == torch.int8:
                of_keys, of_values = (self._grown(scales, end) for scales in self._scales[layer])
                self._scales[layer] = of_keys, of_values
                self._memory[layer] += of_keys.data_ptr(), of_values.data_ptr()
            self._addresses = None
        return self._keys[layer], self._values[layer]

    def view(self, layer: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of positions first to end: (kv_heads, end - first, head_dim) each, not copied."""
        return self._keys[layer][:, first:end], self._values[layer][:, first:end]

    def scales(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The scales of one layer's keys and values where those are int8: float32 (kv_heads, capacity) each."""
        return self._scales[layer]

    def memory(self, layer: int) -> tuple[int, ...]:
        """The addresses of one layer's keys and values, and the bytes from one of their heads to the next: for loops.

        Of int8 the addresses of their scales too. Good until ``reserve`` is called for the layer.
        """
        return self._memory[layer]

    def addresses(self, end: int) -> Array:
        """``memory`` of every layer, int64 (layers, 3), of int8 (layers, 5), with room for positions up to ``end``."""
        for layer, keys in enumerate(self._keys):
            if end > keys.shape[1]:
                self.reserve(layer, end)
        if self._addresses is None:
            self._addresses = np.array(self._memory, np.int64)
        return self._addresses

    def _grown(self, old: torch.Tensor, needed: int) -> torch.Tensor:
        capacity = min(max(needed + GROW_ROWS, 2 * old.shape[1]), max(needed, self._max_positions))
        new = old.new_empty(old.shape[0], capacity, *old.shape[2:])
        new[:, : old.shape[1]] = old
        return keep_bits(new)
