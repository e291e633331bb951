"""The KV cache of one sequence. It lives on the trusted side and grows with the text."""

from __future__ import annotations

import torch

from tsqp.spec.model import ModelSpec

GROW_ROWS = 256


class KVCache:
    """Keys and values of every layer, (kv_heads, capacity, head_dim) each; capacity grows by doubling.

    ``length`` is the number of positions that every layer holds; a forward pass appends layer by layer and then
    calls ``advance``.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        self.length = 0
        self._max_positions = spec.max_positions
        empty = torch.empty(spec.num_kv_heads, 0, spec.head_dim, dtype=dtype)
        self._keys = [empty] * spec.num_layers
        self._values = [empty] * spec.num_layers

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor, position: int) -> None:
        """Store k and v (T, kv_heads, head_dim) of one layer at positions from ``position``."""
        end = position + k.shape[0]
        self._keys[layer] = self._grown(self._keys[layer], end, position)
        self._values[layer] = self._grown(self._values[layer], end, position)
        self._keys[layer][:, position:end] = k.transpose(0, 1)
        self._values[layer][:, position:end] = v.transpose(0, 1)

    def view(self, layer: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of positions first to end: (kv_heads, end - first, head_dim) each, not copied."""
        return self._keys[layer][:, first:end], self._values[layer][:, first:end]

    def advance(self, rows: int) -> None:
        """Every layer now holds ``rows`` more positions."""
        self.length += rows

    def _grown(self, old: torch.Tensor, needed: int, kept: int) -> torch.Tensor:
        capacity = old.shape[1]
        if needed <= capacity:
            return old
        capacity = min(max(needed + GROW_ROWS, 2 * capacity), max(needed, self._max_positions))
        new = old.new_empty(old.shape[0], capacity, old.shape[2])
        new[:, :kept] = old[:, :kept]
        return new
