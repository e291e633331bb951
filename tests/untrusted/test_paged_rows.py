"""Attention in the forms that a device has kernels for is attention."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqp.model.attention import causal_mask, first_visible, masked_softmax, score_product, value_product
from tsqp.untrusted.paged_rows import Visible, attend_capped, attend_fused
from tsqp.untrusted.pages import PAGE

D = 8


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 12),
    position=st.integers(0, 30),
    window=st.none() | st.integers(1, 45),
    kv_heads=st.sampled_from([1, 2, 4]),
    scale=st.none() | st.just(0.3),
    cap=st.none() | st.just(1.5),
    seed=st.integers(0, 1000),
)
def test_every_form_is_attention(
    rows: int, position: int, window: int | None, kv_heads: int, scale: float | None, cap: float | None, seed: int
) -> None:
    first = first_visible(position, window)
    keys = position + rows - first
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, m, D, generator=random) for n, m in ((4, rows), (kv_heads, keys), (kv_heads, keys)))
    out = torch.empty(rows, 4, D)
    attend_fused(q, k, v, position, first, window, out, scale, cap)
    scores = score_product(q * (D**-0.5 if scale is None else scale), k)
    probabilities = masked_softmax(scores, causal_mask(position, rows, first, keys, window), cap)
    torch.testing.assert_close(out, value_product(probabilities, v).transpose(0, 1), rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    kv_heads=st.sampled_from([1, 2, 4]),
    scale=st.none() | st.just(0.3),
    seed=st.integers(0, 1000),
)
def test_capped_rows_at_once_are_each_row_alone(
    lengths: list[int], kv_heads: int, scale: float | None, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    rows, keys, cap = len(lengths), 20, 1.5
    q = torch.randn(rows, kv_heads, 4 // kv_heads, D, generator=random)
    k, v = torch.randn(2, rows, kv_heads, keys, D, generator=random)
    mask = torch.arange(keys) < torch.tensor(lengths).view(rows, 1, 1, 1)
    found = attend_capped(q, k, v, mask, scale, cap)
    for row, length in enumerate(lengths):
        scores = score_product(q[row].reshape(4, 1, D) * (D**-0.5 if scale is None else scale), k[row, :, :length])
        alone = value_product(masked_softmax(scores, torch.ones(1, length, dtype=torch.bool), cap), v[row, :, :length])
        torch.testing.assert_close(found[row].reshape(4, 1, D), alone, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    positions=st.lists(st.integers(0, 4 * PAGE - 1), min_size=1, max_size=4),
    window=st.none() | st.integers(1, 5 * PAGE),
)
def test_a_row_sees_its_own_window_and_no_more(positions: list[int], window: int | None) -> None:
    """Each key that is seen is one position, once; pages past the end of a table are those of nobody."""
    rows, pages = len(positions), 4
    table = torch.arange(1, 1 + rows * pages, dtype=torch.int32).view(rows, pages)
    visible = Visible.empty(rows, pages, window, torch.device("cpu"))
    visible.fill(table, torch.tensor(positions), window)
    for row, position in enumerate(positions):
        slots = (visible.index[row].unsqueeze(1) * PAGE + torch.arange(PAGE)).flatten()
        seen = slots[visible.mask[row, 0, 0]] - (1 + row * pages) * PAGE
        assert seen.tolist() == [*range(first_visible(position, window), position + 1)]
