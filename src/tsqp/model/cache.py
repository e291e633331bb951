"""The KV cache of one sequence. It lives where attention is computed and grows with the text.

Keys and values are of one float dtype, or int8 with a float32 scale for each position and KV head, as
``tsqp.arith.quantise`` has them: what is kept is integer · scale.
"""

from __future__ import annotations

from typing import NamedTuple

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


class _Layer(NamedTuple):
    """Memory of one layer: keys and values, their scales, empty where those are floats, and where all of it lies."""

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor
    value_scales: torch.Tensor
    memory: tuple[int, ...]


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
        scales = torch.empty(empty.shape[:2], dtype=torch.float32, device=device)
        self._layers = [_Layer(empty, empty, scales, scales, (0, 0, 0))] * config.num_layers
        self._addresses: Array | None = None

    def reserve(self, layer: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, (kv_heads, capacity, head_dim), with room for positions up to ``end``."""
        here = self._layers[layer]
        if end > here.keys.shape[1]:
            here = self._replace(layer, here, end)
        return here.keys, here.values

    def view(self, layer: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of positions first to end: (kv_heads, end - first, head_dim) each, not copied."""
        here = self._layers[layer]
        return here.keys[:, first:end], here.values[:, first:end]

    def scales(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The scales of one layer's keys and values where those are int8: float32 (kv_heads, capacity) each."""
        here = self._layers[layer]
        return here.key_scales, here.value_scales

    def memory(self, layer: int) -> tuple[int, ...]:
        """The addresses of one layer's keys and values, and the bytes from one of their heads to the next: for loops.

        Of int8 the addresses of their scales too. Good until ``reserve`` is called for the layer.
        """
        return self._layers[layer].memory

    def addresses(self, end: int) -> Array:
        """``memory`` of every layer, int64 (layers, 3), of int8 (layers, 5), with room for positions up to ``end``."""
        for layer, here in enumerate(self._layers):
            if end > here.keys.shape[1]:
                self._replace(layer, here, end)
        if self._addresses is None:
            self._addresses = np.array([here.memory for here in self._layers], np.int64)
        return self._addresses

    def bytes_for(self, end: int) -> int:
        """Memory of all layers once there is room for positions up to ``end``; a cache never shrinks."""
        like = self._layers[0].keys
        capacity = max(like.shape[1], self._capacity(end))
        of_scales = self._layers[0].key_scales.itemsize if self.dtype == torch.int8 else 0
        return 2 * len(self._layers) * like.shape[0] * capacity * (like.shape[2] * like.itemsize + of_scales)

    def truncate(self, length: int) -> None:
        """Hold the first ``length`` positions only; their memory stays."""
        self.length = min(self.length, length)

    def copy_from(self, other: KVCache, length: int) -> None:
        """Hold the first ``length`` positions of another cache, in memory of its own and in the place of all before."""
        for layer, there in enumerate(other._layers):
            self._replace(layer, there, length, first=length)
        self.length = length

    def _capacity(self, needed: int) -> int:
        """Positions that there is room for once ``needed`` are asked for."""
        return min(-(-needed // GROW_ROWS) * GROW_ROWS, max(needed, self._max_positions))

    def _replace(self, layer: int, old: _Layer, end: int, first: int | None = None) -> _Layer:
        """A layer with room up to ``end`` that holds what ``old`` does, or its ``first`` positions.

        It is there as a whole or not at all, whatever fails or interrupts: addresses never name memory that is freed.
        """
        keys, values = (self._grown(one[:, :first], end) for one in (old.keys, old.values))
        scales = old.key_scales, old.value_scales
        memory: tuple[int, ...] = keys.data_ptr(), values.data_ptr(), keys.stride(0) * keys.itemsize
        if self.dtype == torch.int8:
            scales = self._grown(scales[0][:, :first], end), self._grown(scales[1][:, :first], end)
            memory += scales[0].data_ptr(), scales[1].data_ptr()
        new = _Layer(keys, values, *scales, memory)
        self._addresses = None
        self._layers[layer] = new
        return new

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
