"""Causal grouped-query attention over a KV cache, whole or with the two products done elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def first_visible(position: int, window: int | None) -> int:
    """The first key that the query at ``position`` attends to."""
    return 0 if window is None else max(0, position - window + 1)


def causal_mask(position: int, rows: int, first_key: int, keys: int, window: int | None) -> torch.Tensor:
    """True where a query may look: bool (rows, keys) for queries from ``position`` and keys from ``first_key``."""
    query = torch.arange(position, position + rows).unsqueeze(1)
    key = torch.arange(first_key, first_key + keys).unsqueeze(0)
    mask = key <= query
    return mask if window is None else mask & (key > query - window)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: int, first_key: int, window: int | None
) -> torch.Tensor:
    """Softmax(Q·Kᵀ/√d)·V without materialised scores.

    ``q`` (T, heads, head_dim) at positions from ``position``; ``k``, ``v`` (kv_heads, keys, head_dim) at positions
    from ``first_key``. Returns (T, heads, head_dim).
    """
    rows, heads, head_dim = q.shape
    kv_heads, keys, _ = k.shape
    if rows == 1:  # a decode step sees every key; the heads of a group share their keys as rows of one product
        grouped = q.view(1, kv_heads, heads // kv_heads, head_dim)
        return F.scaled_dot_product_attention(grouped, k[None], v[None]).reshape(1, heads, head_dim)
    whole = position == first_key and rows == keys and (window is None or rows <= window)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k[None],
        v[None],
        attn_mask=None if whole else causal_mask(position, rows, first_key, keys, window),
        is_causal=whole,
        enable_gqa=heads != kv_heads,
    )
    return out[0].transpose(0, 1)  # (T, heads, head_dim)


def masked_softmax(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Probabilities of scores (heads, rows, keys) under a bool mask (rows, keys); float32 inside."""
    wide = scores.float().masked_fill_(~mask, float("-inf"))
    return torch.softmax(wide, dim=-1).to(scores.dtype)


def score_product(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Q·Kᵀ: q (heads, rows, head_dim), k (kv_heads, keys, head_dim) to (heads, rows, keys)."""
    return _grouped_product(q, k.transpose(1, 2))


def value_product(p: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Probabilities·V: p (heads, rows, keys), v (kv_heads, keys, head_dim) to (heads, rows, head_dim)."""
    return _grouped_product(p, v)


def _grouped_product(x: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Heads of a group share their right factor: (heads, rows, n) · (kv_heads, n, m) to (heads, rows, m)."""
    heads, rows, inner = x.shape
    kv_heads = shared.shape[0]
    grouped = x.reshape(kv_heads, heads // kv_heads * rows, inner)
    return torch.bmm(grouped, shared).view(heads, rows, -1)
