"""The KV cache keeps what was written, whatever it grows by, and never grows past the context without need."""

from __future__ import annotations

from dataclasses import replace

import pytest
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
def test_growth_is_by_many_positions_and_ends_at_the_context(needed: int) -> None:
    """Decode is one row at a time: without room ahead every token would copy the whole cache."""
    context = 1_000
    cache = KVCache(replace(CONFIG, max_positions=context), torch.float32)
    capacity = cache.reserve(0, needed)[0].shape[1]
    assert needed <= capacity < needed + GROW_ROWS
    assert capacity % GROW_ROWS == 0 or capacity == max(needed, context)
    grown = cache.reserve(0, capacity + 1)[0].shape[1]
    assert grown > capacity
    assert cache.reserve(0, 1)[0].shape[1] == grown, "it never shrinks"


@given(st.integers(1, 1_500), st.integers(1, 1_500), st.sampled_from([torch.bfloat16, torch.int8]))
def test_bytes_are_those_of_the_memory_that_will_be_there(first: int, second: int, dtype: torch.dtype) -> None:
    cache = KVCache(replace(CONFIG, max_positions=1_000), dtype)
    for end in (first, second):
        expected = cache.bytes_for(end)
        held = [(*cache.reserve(layer, end), *cache.scales(layer)) for layer in range(CONFIG.num_layers)]
        assert expected == cache.bytes_for(0) == sum(one.nbytes for layer in held for one in layer)


def test_a_copy_holds_the_beginning_and_is_independent() -> None:
    cache = KVCache(CONFIG, torch.float32)
    for layer in range(CONFIG.num_layers):
        write(cache, layer, 0, 300)
    cache.advance(300)
    twin = KVCache(CONFIG, torch.float32)
    twin.copy_from(cache, 7)
    assert (twin.length, cache.length) == (7, 300)
    for layer in range(CONFIG.num_layers):
        assert torch.equal(twin.view(layer, 0, 7)[0], cache.view(layer, 0, 7)[0])
        assert torch.equal(twin.view(layer, 0, 7)[1], cache.view(layer, 0, 7)[1])
        assert twin.memory(layer)[0] == twin.view(layer, 0, 7)[0].data_ptr() != cache.memory(layer)[0]
        write(twin, layer, 3, 9)
        assert cache.view(layer, 0, 300)[0][0, :, 0].tolist() == [row + 10_000 * layer for row in range(300)]
    assert twin.bytes_for(0) < cache.bytes_for(0)
    twin.copy_from(cache, 200)  # once more, where the first copy was interrupted
    assert twin.length == 200
    assert torch.equal(twin.view(0, 0, 200)[0], cache.view(0, 0, 200)[0])


def test_a_copy_has_scales_of_its_own() -> None:
    cache = KVCache(CONFIG, torch.int8)
    for layer in range(CONFIG.num_layers):
        for held in (*cache.reserve(layer, 300), *cache.scales(layer)):
            held.fill_(3 + layer)
    cache.advance(300)
    twin = KVCache(CONFIG, torch.int8)
    twin.copy_from(cache, 7)
    for layer in range(CONFIG.num_layers):
        for held in (*twin.view(layer, 0, 7), *(scales[:, :7] for scales in twin.scales(layer))):
            assert (held == 3 + layer).all()
            held.fill_(1)
        assert list(twin.memory(layer)[3:]) == [scales.data_ptr() for scales in twin.scales(layer)]
        assert all((scales == 3 + layer).all() for scales in cache.scales(layer))


def test_what_was_cut_off_is_written_again() -> None:
    cache = KVCache(CONFIG, torch.float32)
    write(cache, 0, 0, 10)
    cache.advance(10)
    cache.truncate(20)
    assert cache.length == 10
    cache.truncate(4)
    assert cache.length == 4


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


@pytest.mark.parametrize(
    ("dtype", "fails_at"), [(torch.float32, n) for n in (0, 1)] + [(torch.int8, n) for n in range(4)]
)
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_after_growing_has_failed_addresses_name_what_is_there(
    dtype: torch.dtype, fails_at: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, grown = KVCache(CONFIG, dtype), KVCache._grown
    write(cache, 0, 0, 100)
    calls = iter(range(8))

    def failing(self: KVCache, old: torch.Tensor, needed: int) -> torch.Tensor:
        if next(calls) == fails_at:
            raise error
        return grown(self, old, needed)

    monkeypatch.setattr(KVCache, "_grown", failing)
    with pytest.raises(error):
        cache.reserve(0, GROW_ROWS + 1)
    monkeypatch.undo()
    for end in (100, GROW_ROWS + 1):
        held = (*cache.reserve(0, end), *cache.scales(0))
        assert cache.addresses(end)[0].tolist() == list(cache.memory(0))
        assert [*cache.memory(0)[:2], *cache.memory(0)[3:]] == [
            one.data_ptr() for one in held[: len(held) if dtype == torch.int8 else 2]
        ]
        assert held[0].shape == held[1].shape
        assert held[0].shape[1] >= end
        assert held[0][0, :100, 0].tolist() == torch.arange(100).to(dtype).tolist()
