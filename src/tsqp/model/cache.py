"""The KV cache of one sequence. It lives where attention is computed and grows with the text."""

from __future__ import annotations

from copy import copy

import numpy as np
import torch

from tsqp.arith.bits import Array, keep_bits
from tsqp.config.model import ModelConfig

GROW_ROWS = 256  # positions that a cache grows by


class Positions:
    """A sequence that grows: ``length`` positions of it are held."""

    def __init__(self) -> None:
        self.length = 0

    def advance(self, rows: int) -> None:
        """Now ``rows`` more positions are held."""
        self.length += rows


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
        self._memory = [(0, 0, 0)] * config.num_layers
        self._addresses: Array | None = None

    def reserve(self, layer: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, (kv_heads, capacity, head_dim), with room for positions up to ``end``."""
        if end > self._keys[layer].shape[1]:
            self._keys[layer] = self._grown(self._keys[layer], end)
            self._values[layer] = self._grown(self._values[layer], end)
            self._locate(layer)
        return self._keys[layer], self._values[layer]

    def view(self, layer: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of positions first to end: (kv_heads, end - first, head_dim) each, not copied."""
        return self._keys[layer][:, first:end], self._values[layer][:, first:end]

    def memory(self, layer: int) -> tuple[int, int, int]:
        """The addresses of one layer's keys and values, and the bytes from one of their heads to the next: for loops.

        Good until ``reserve`` is called for the layer.
        """
        return self._memory[layer]

    def addresses(self, end: int) -> Array:
        """``memory`` of every layer, int64 (layers, 3), with room for positions up to ``end``."""
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
        return 2 * len(self._keys) * like.shape[0] * capacity * like.shape[2] * like.itemsize

    def truncate(self, length: int) -> None:
        """Hold the first ``length`` positions only; their memory stays."""
        self.length = min(self.length, length)

    def copied(self, length: int) -> KVCache:
        """A cache of its own with the first ``length`` positions of this one."""
        twin = copy(self)
        twin._keys, twin._values, twin._memory = list(self._keys), list(self._values), list(self._memory)
        for layer in range(len(self._keys)):
            for held in (twin._keys, twin._values):
                held[layer] = self._grown(held[layer][:, :length], length)
            twin._locate(layer)
        twin.length = length
        return twin

    def _capacity(self, needed: int) -> int:
        """Positions that there is room for once ``needed`` are asked for."""
        return min(-(-needed // GROW_ROWS) * GROW_ROWS, max(needed, self._max_positions))

    def _locate(self, layer: int) -> None:
        keys, values = self._keys[layer], self._values[layer]
        self._memory[layer] = keys.data_ptr(), values.data_ptr(), keys.stride(0) * keys.itemsize
        self._addresses = None

    def _grown(self, old: torch.Tensor, needed: int) -> torch.Tensor:
        """Larger memory with what ``old`` holds.

        By a fixed number of positions: a decode step reads all of a cache anyway, so a copy in every 256 steps costs
        little, and what a budget counts is what is used.
        """
        new = old.new_empty(old.shape[0], self._capacity(needed), old.shape[2])
        new[:, : old.shape[1]] = old
        return keep_bits(new)
