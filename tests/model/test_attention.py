"""Attention in its three forms against the formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tsqp.checkpoint import open_checkpoint
from tsqp.model import attention, local
from tsqp.model.attention import attend, causal_mask, first_visible
from tsqp.model.batch import Batch
from tsqp.model.block_attention import BlockAttention
from tsqp.model.cache import KVCache
from tsqp.model.local import StepAttention, TorchAttention, pick_attention
from tsqp.model.meter import Unmetered
from tsqp.model.pending import run


def plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position: int,
    first: int,
    window: int | None,
    cap: float | None = None,
) -> torch.Tensor:
    """Softmax(Q·Kᵀ/√d + mask)·V in float32, scores softly capped: (T, heads, head_dim)."""
    q, k, v = q.float(), k.float(), v.float()
    k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
    scores = q @ k.transpose(1, 2) * q.shape[2] ** -0.5
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [TorchAttention, StepAttention, BlockAttention])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_every_way_attends_alike(
    dtype: torch.dtype, kind: type[TorchAttention | BlockAttention], window: int | None, cap: float | None
) -> None:
    """Prompts and decode steps of several sequences in one chunk, each over its own cache, in two layers."""
    config = replace(open_checkpoint("synthetic:tiny").config, num_layers=2, windows=(window, None))
    generator = torch.Generator().manual_seed(3)
    caches = [KVCache(config, dtype) for _ in range(3)]
    batch = Batch([[0] * 40, [0], [0] * 3], caches)
    for cache, known in zip(caches, (0, 70, 11), strict=True):
        cache.advance(known)
    (chunk,) = batch.chunks(1000)
    of_chunk = kind(config.windows, Unmetered(), cap=cap).of(chunk)
    for layer, seen in enumerate((window, None)):
        for span in chunk.spans:
            for held in span.cache.reserve(layer, span.end):
                held.copy_(torch.randn(held.shape, generator=generator))
        q = torch.randn(config.num_heads, chunk.rows, config.head_dim, generator=generator).to(dtype)
        out = torch.full((chunk.rows, config.q_size), float("nan"), dtype=dtype)
        run(of_chunk.steps(layer, q, out))
        for span in chunk.spans:
            k, v = span.cache.view(layer, 0, span.end)
            expected = plain(q[:, span.slice], k, v, span.position, 0, seen, cap).flatten(1)
            tolerance = 1e-5 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(out[span.slice].float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("fused", [False, True])
def test_the_choice_of_a_way(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    monkeypatch.setattr(local, "fused_is_fast", lambda: fused)
    assert type(pick_attention((None,), torch.bfloat16, Unmetered())) is (StepAttention if fused else BlockAttention)
    assert type(pick_attention((None,), torch.float32, Unmetered())) is BlockAttention
    for dtype, device, compiled in (
        (torch.float16, "cpu", True),
        (torch.bfloat16, "meta", True),
        (torch.float32, "cpu", False),
    ):
        way = pick_attention((None,), dtype, Unmetered(), device, compiled=compiled)
        assert isinstance(way, TorchAttention)
