"""Attention in its three forms against the formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tsqp.model import attention
from tsqp.model.attention import attend, causal_mask, first_visible


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: int, first: int, window: int | None
) -> torch.Tensor:
    """Softmax(Q·Kᵀ/√d + mask)·V in float32: (T, heads, head_dim)."""
    q, k, v = q.float(), k.float(), v.float()
    k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
    scores = q @ k.transpose(1, 2) * q.shape[2] ** -0.5
    scores.masked_fill_(~causal_mask(position, q.shape[1], first, k.shape[1], window), float("-inf"))
    return (torch.softmax(scores, -1) @ v).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.sampled_from([1, 2, 63, 128, 129, 300]),
    position=st.integers(0, 200),
    window=st.sampled_from([None, 1, 7, 100, 1000]),
    groups=st.sampled_from([(4, 2), (3, 1), (2, 2)]),
    seed=st.integers(0, 99),
)
def test_every_form_is_the_formula(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    fused: bool,
    rows: int,
    position: int,
    window: int | None,
    groups: tuple[int, int],
    seed: int,
) -> None:
    monkeypatch.setattr(attention, "fused_is_fast", lambda: fused)
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads = groups
    first = first_visible(position, window)
    keys = position + rows - first
    q = torch.randn(heads, rows, 16, generator=generator).to(dtype)
    k, v = (torch.randn(kv_heads, keys, 16, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(rows, heads, 16, dtype=dtype)
    attend(q, k, v, position, first, window, out)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(out.float(), plain(q, k, v, position, first, window), rtol=tolerance, atol=tolerance)
