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

GROW_ROWS = 256  # positions that a cache grows by


def cache_dtype(kept: KVDtype) -> torch.dtype:
    """The dtype of a cache, by its name."""
    return torch.int8 if kept == "int8" else TORCH_DTYPES[kept]


class Positions:
    """A sequence that grows: ``length`` positions of it are held. It began with a prompt of ``begun`` tokens."""

    def __init__(self) -> None:
        self.length = self.begun = 0

    def begin(self, tokens: int) -> None:
        """The prompt has so many tokens, unless something else was said before: it may come in several passes."""
        self.begun = self.begun or tokens

    def advance(self, rows: int) -> None:
        """Now ``rows`` more positions are held."""
        self.length += rows


def query_dtype(kept: torch.dtype) -> torch.dtype:
    """What queries are that attend to a cache of ``kept``: the same floats, float32 where it holds integers."""
    return torch.float32 if kept == torch.int8 else kept


class KVCache(Positions):
    """Keys and values of every layer, (kv_heads, capacity, head_dim) each; capacity grows by ``GROW_ROWS``.

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
            self._keys[layer] = self._grown(self._keys[layer], end)
            self._values[layer] = self._grown(self._values[layer], end)
            if self.dtype == torch.int8:
                of_keys, of_values = self._scales[layer]
                self._scales[layer] = self._grown(of_keys, end), self._grown(of_values, end)
            self._locate(layer)
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

    def bytes_for(self, end: int) -> int:
        """Memory of all layers once there is room for positions up to ``end``; a cache never shrinks."""
        like = self._keys[0]
        capacity = max(like.shape[1], self._capacity(end))
        of_scales = self._scales[0][0].itemsize if self.dtype == torch.int8 else 0
        return 2 * len(self._keys) * like.shape[0] * capacity * (like.shape[2] * like.itemsize + of_scales)

    def truncate(self, length: int) -> None:
        """Hold the first ``length`` positions only; their memory stays."""
        self.length = min(self.length, length)

    def copy_from(self, other: KVCache, length: int) -> None:
        """Hold the first ``length`` positions of another cache, in memory of its own and in the place of all before."""
        for layer in range(len(self._keys)):
            self._keys[layer] = self._grown(other._keys[layer][:, :length], length)
            self._values[layer] = self._grown(other._values[layer][:, :length], length)
            if self.dtype == torch.int8:
                of_keys, of_values = (self._grown(scales[:, :length], length) for scales in other._scales[layer])
                self._scales[layer] = of_keys, of_values
            self._locate(layer)
        self.length = length

    def _capacity(self, needed: int) -> int:
        """Positions that there is room for once ``needed`` are asked for."""
        return min(-(-needed // GROW_ROWS) * GROW_ROWS, max(needed, self._max_positions))

    def _locate(self, layer: int) -> None:
        keys, values = self._keys[layer], self._values[layer]
        self._memory[layer] = keys.data_ptr(), values.data_ptr(), keys.stride(0) * keys.itemsize
        if self.dtype == torch.int8:
            self._memory[layer] += tuple(scales.data_ptr() for scales in self._scales[layer])
        self._addresses = None

    def _grown(self, old: torch.Tensor, needed: int) -> torch.Tensor:
        """Larger memory with what ``old`` holds.

        By a fixed number of positions: a decode step reads all of a cache anyway, so a copy in every 256 steps costs
        little, and what a budget counts is what is used.
        """
        new = self._memory_like(old, (old.shape[0], self._capacity(needed), *old.shape[2:]))
        new[:, : old.shape[1]] = old
        return keep_bits(new)

    def _memory_like(self, old: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Memory for positions, most of which nobody has stored: what lies there is whatever was there before."""
        return old.new_empty(shape)
