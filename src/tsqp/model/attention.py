"""Causal grouped-query attention over a KV cache, whole or with the two products done elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tsqp.model.norms import soft_capped

BLOCK_QUERIES = 128  # of a product of bfloat16, where torch's fused kernel is slow


def first_visible(position: int, window: int | None) -> int:
    """The first key that the query at ``position`` attends to."""
    return 0 if window is None else max(0, position - window + 1)


def causal_mask(
    position: int, rows: int, first_key: int, keys: int, window: int | None, device: torch.device | None = None
) -> torch.Tensor:
    """True where a query may look: bool (rows, keys) for queries from ``position`` and keys from ``first_key``."""
    query = torch.arange(position, position + rows, device=device).unsqueeze(1)
    key = torch.arange(first_key, first_key + keys, device=device).unsqueeze(0)
    mask = key <= query
    return mask if window is None else mask & (key > query - window)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position: int,
    first_key: int,
    window: int | None,
    out: torch.Tensor,
    scale: float | None = None,
    cap: float | None = None,
) -> None:
    """Softmax(scale · Q·Kᵀ)·V, with 1/√head_dim for a scale of None; scores have the soft cap ``cap`` unless None.

    ``q`` (heads, T, head_dim) at positions from ``position``; ``k``, ``v`` (kv_heads, keys, head_dim) at positions
    from ``first_key``; ``out`` (T, heads, head_dim).
    """
    if cap is not None:  # which torch's kernel does not know
        _attend_in_blocks(q, k, v, position, first_key, window, out, scale, cap)
    elif q.shape[1] == 1:
        _attend_one(q, k, v, out, scale)
    elif q.dtype == torch.bfloat16 and q.device.type == "cpu" and not fused_is_fast():
        _attend_in_blocks(q, k, v, position, first_key, window, out, scale)
    else:
        _attend_fused(q, k, v, position, first_key, window, out, scale)


def fused_is_fast() -> bool:
    """torch's fused kernel multiplies bfloat16 on AMX tiles, and where there are none in float32, far slower."""
    return bool(torch.cpu._is_amx_tile_supported())


def _attend_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, scale: float | None) -> None:
    """A decode step sees every key; the heads of a group share their keys as rows of one product."""
    heads, _, head_dim = q.shape
    kv_heads = k.shape[0]
    grouped = q.reshape(1, kv_heads, heads // kv_heads, head_dim)
    out.copy_(F.scaled_dot_product_attention(grouped, k[None], v[None], scale=scale).view(1, heads, head_dim))


def _attend_fused(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position: int,
    first_key: int,
    window: int | None,
    out: torch.Tensor,
    scale: float | None,
) -> None:
    """torch's own kernel, which never materialises the scores."""
    rows, keys = q.shape[1], k.shape[1]
    whole = position == first_key and rows == keys and (window is None or rows <= window)
    mixed = F.scaled_dot_product_attention(
        q[None],
        k[None],
        v[None],
        attn_mask=None if whole else causal_mask(position, rows, first_key, keys, window, q.device),
        is_causal=whole,
        scale=scale,
        enable_gqa=len(q) != len(k),
    )
    out.copy_(mixed[0].transpose(0, 1))


def _attend_in_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position: int,
    first_key: int,
    window: int | None,
    out: torch.Tensor,
    scale: float | None,
    cap: float | None = None,
) -> None:
    """Block by block of queries, with products over the keys that the block can see."""
    rows = q.shape[1]
    scaled = q * (q.shape[2] ** -0.5 if scale is None else scale)
    for start in range(0, rows, BLOCK_QUERIES):
        end = min(start + BLOCK_QUERIES, rows)
        low = max(first_key, first_visible(position + start, window)) - first_key
        high = position + end - first_key
        scores = soft_capped(score_product(scaled[:, start:end], k[:, low:high]), cap)  # (heads, block, keys seen)
        # Without a window only the last `block` keys can be in the future of a query.
        edge = low if window is not None else max(low, high - (end - start))
        mask = causal_mask(position + start, end - start, first_key + edge, high - edge, window, q.device)
        scores[:, :, edge - low :].masked_fill_(~mask, float("-inf"))
        mixed = value_product(torch.softmax(scores, dim=-1), v[:, low:high])
        out[start:end] = mixed.transpose(0, 1)


def masked_softmax(scores: torch.Tensor, mask: torch.Tensor, cap: float | None = None) -> torch.Tensor:
    """Probabilities of scores (heads, rows, keys), softly capped, under a bool mask (rows, keys); float32 inside."""
    wide = soft_capped(scores.float(), cap).masked_fill_(~mask, float("-inf"))
    return torch.softmax(wide, dim=-1).to(scores.dtype)


def score_product(q: torch.Tensor, k: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Q·Kᵀ: q (heads, rows, head_dim), k (kv_heads, keys, head_dim) to (heads, rows, keys), in ``out`` if given."""
    return _grouped_product(q, k.transpose(1, 2), out)


def value_product(p: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Probabilities·V: p (heads, rows, keys), v (kv_heads, keys, head_dim) to (heads, rows, head_dim)."""
    return _grouped_product(p, v, out)


def _grouped_product(x: torch.Tensor, shared: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """Heads of a group share their right factor: (heads, rows, n) · (kv_heads, n, m) to (heads, rows, m)."""
    heads, rows, inner = x.shape
    kv_heads, _, columns = shared.shape
    shape = (kv_heads, heads // kv_heads * rows, columns)
    product = torch.bmm(x.reshape(kv_heads, -1, inner), shared, out=None if out is None else out.view(shape))
    return product.view(heads, rows, columns)
