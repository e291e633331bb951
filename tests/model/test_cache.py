"""The KV cache keeps what was written, whatever it grows by, and never grows past the context without need."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from tsqp.checkpoint import open_checkpoint
from tsqp.model.cache import GROW_ROWS, KVCache

CONFIG = open_checkpoint("synthetic:tiny").config


def write(cache: KVCache, layer: int, first: int, end: int) -> None:
    """Keys that are their position and layer; values are those, negated."""
    keys, values = cache.reserve(layer, end)
    marks = torch.arange(first, end, dtype=keys.dtype)[None, :, None] + 10_000 * layer
    keys[:, first:end] = marks
    values[:, first:end] = -marks


@given(st.lists(st.integers(1, 700), min_size=1, max_size=6))
def test_what_was_written_stays(steps: list[int]) -> None:
    cache, length = KVCache(CONFIG, torch.float32), 0
    for step in steps:
        for layer in range(CONFIG.num_layers):
            write(cache, layer, length, length + step)
        length += step
    for layer in range(CONFIG.num_layers):
        keys, values = cache.view(layer, 0, length)
        assert keys.shape == values.shape == (CONFIG.num_kv_heads, length, CONFIG.head_dim)
        expected = torch.arange(length, dtype=torch.float32)[None, :, None] + 10_000 * layer
        assert (keys == expected).all()
        assert (values == -expected).all()


def test_a_view_is_the_memory_itself() -> None:
    cache = KVCache(CONFIG, torch.float32)
    write(cache, 0, 0, 4)
    cache.view(0, 1, 3)[0].fill_(7)
    assert cache.view(0, 0, 4)[0][0, :, 0].tolist() == [0, 7, 7, 3]


def test_one_layer_does_not_grow_another() -> None:
    cache = KVCache(CONFIG, torch.float32)
    write(cache, 0, 0, 4)
    assert cache.view(1, 0, 4)[0].shape[1] == 0


@given(st.integers(1, 5_000))
def test_growth_is_by_doubling_and_ends_at_the_context(needed: int) -> None:
    """Decode is one row at a time: without room ahead every token would copy the whole cache."""
    context = 1_000
    cache = KVCache(replace(CONFIG, max_positions=context), torch.float32)
    capacity = cache.reserve(0, needed)[0].shape[1]
    assert capacity == max(needed, min(needed + GROW_ROWS, context))
    grown = cache.reserve(0, capacity + 1)[0].shape[1]
    assert grown == max(capacity + 1, min(max(capacity + 1 + GROW_ROWS, 2 * capacity), context))
    assert cache.reserve(0, 1)[0].shape[1] == grown, "it never shrinks"


def test_length_is_what_was_advanced_by_not_what_was_reserved() -> None:
    cache = KVCache(CONFIG, torch.float32)
    cache.reserve(0, 50)
    assert cache.length == 0
    cache.advance(3)
    assert cache.length == 3


@given(st.lists(st.integers(1, 700), min_size=1, max_size=6))
def test_scales_of_int8_stay_as_well(steps: list[int]) -> None:
    cache, length = KVCache(CONFIG, torch.int8), 0
    for step in steps:
        keys, _ = cache.reserve(0, length + step)
        for sign, scales in zip((1, -1), cache.scales(0), strict=True):
            assert scales.shape == keys.shape[:2]
            scales[:, length : length + step] = sign * torch.arange(length, length + step)
        length += step
    for sign, scales in zip((1, -1), cache.scales(0), strict=True):
        assert (scales[:, :length] == sign * torch.arange(length)).all()
    assert list(cache.memory(0)[3:]) == [scales.data_ptr() for scales in cache.scales(0)]


def test_int8_takes_little_more_than_a_quarter() -> None:
    taken = {}
    for dtype in (torch.float32, torch.int8):
        cache = KVCache(CONFIG, dtype)
        taken[dtype] = sum(held.nbytes for held in (*cache.reserve(0, 100), *cache.scales(0)))
    assert taken[torch.int8] == taken[torch.float32] / 4 * (1 + 4 / CONFIG.head_dim)


def test_memory_is_where_a_view_lies() -> None:
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2), (torch.int8, 1)):
        cache = KVCache(CONFIG, dtype)
        cache.reserve(1, 5)
        keys, values, apart, *_ = cache.memory(1)
        for address, view in zip((keys, values), cache.view(1, 0, 5), strict=True):
            assert address == view.data_ptr()
            assert apart == view[1].data_ptr() - view[0].data_ptr()
            assert apart == view.stride(0) * size
