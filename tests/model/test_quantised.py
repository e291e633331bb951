"""Slices of groups as a shard's worker reads them, and the digests that a client has of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.families import tiny_model
from tsqp.arith.quantise import Int8Weights
from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.base import Checkpoint
from tsqp.config.groups import LinearGroup, cut, group_keys, linear_groups
from tsqp.config.shard import Shard, whole
from tsqp.model.quantised import GroupDigests, ShardDigests, load_quantised_group

MODELS = ["synthetic:tiny", "llama-biases", "phi3", "cohere"]
READ: dict[str, dict[Any, Int8Weights]] = {}


def opened(model: str) -> Checkpoint:
    return open_checkpoint(model if ":" in model else str(tiny_model(model).directory))


def groups_of(model: str) -> dict[Any, Int8Weights]:
    """Every group of a model, whole; read once."""
    if model not in READ:
        checkpoint = opened(model)
        READ[model] = {key: load_quantised_group(checkpoint, key) for key in group_keys(checkpoint.config)}
    return READ[model]


@st.composite
def shards(draw: st.DrawFn) -> Shard:
    """Of a model of two layers."""
    first, of = draw(st.integers(0, 2)), draw(st.integers(1, 32))
    begin = draw(st.integers(0, of - 1))
    return Shard(first, draw(st.integers(first + 1, 3)), begin, draw(st.integers(begin + 1, of)), of)


@pytest.mark.parametrize("model", MODELS)
@given(shard=shards())
def test_a_slice_is_rows_of_the_whole_to_the_bit(model: str, shard: Shard) -> None:
    checkpoint, groups = opened(model), groups_of(model)
    for key in shard.keys(checkpoint.config):
        found, group = load_quantised_group(checkpoint, key, shard), groups[key]
        begin, stop = shard.columns(len(group.wq))
        assert torch.equal(found.wq, group.wq[begin:stop])
        assert torch.equal(found.scales, group.scales[begin:stop])
        assert (found.bias is None) == (group.bias is None)
        if found.bias is not None and group.bias is not None:
            assert torch.equal(found.bias, group.bias[begin:stop])
        assert len(found.wq) == len(found.scales) == stop - begin


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("text", ["0..3/1..2of4", "1..2", "2..3/0..1of2", "0..2/3..8of8"])
def test_a_shard_reads_its_rows_and_nothing_else(model: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where a checkpoint hands out what it has read: no other layer, no other row, and no embedding."""
    checkpoint, shard, read = opened(model), Shard.parse(text), dict[str, int]()
    read_blocks = checkpoint._read_blocks

    def counted(name: str, first: int, end: int) -> Iterator[tuple[int, torch.Tensor]]:
        for begun, rows in read_blocks(name, first, end):
            read[name] = read.get(name, 0) + rows.nbytes
            yield begun, rows

    def refused(name: str) -> torch.Tensor:
        raise AssertionError(f"{name} is read whole")

    monkeypatch.setattr(checkpoint, "_read_blocks", counted)
    monkeypatch.setattr(checkpoint, "tensor", refused)
    for key in shard.keys(checkpoint.config):
        load_quantised_group(checkpoint, key, shard)
    of_layers = [name for name in read if name.startswith("model.layers.")]
    assert {int(name.split(".")[2]) for name in of_layers} == set(shard.layers(checkpoint.config))
    expected = 0
    for name, layer in shard.keys(checkpoint.config):
        group = linear_groups(checkpoint.config)[name]
        item = checkpoint.dtype(f"model.layers.{layer}.mlp.down_proj.weight" if layer is not None else "lm_head.weight")
        expected += shard.width(group) * (group.in_features + group.bias) * item.itemsize
    assert sum(read.values()) == expected


def digests_of(model: str, shard: Shard) -> dict[Any, str]:
    """As a worker has them: of slices that it reads itself."""
    checkpoint, digests = opened(model), GroupDigests(shard.first)
    for key in shard.keys(checkpoint.config):
        digests.add(key, load_quantised_group(checkpoint, key, shard).wq)
    return dict(digests.hexdigests())


@given(st.lists(shards(), min_size=1, max_size=4))
def test_digests_of_several_shards_in_one_pass_are_those_of_their_workers(some: list[Shard]) -> None:
    model = "synthetic:tiny"
    config = opened(model).config
    digests = ShardDigests([*some, whole(config)], config)
    for key, group in groups_of(model).items():
        digests.add(key, group.wq)
    found = digests.hexdigests()
    assert found == {shard: digests_of(model, shard) for shard in {*some, whole(config)}}
    assert set(found[whole(config)]) == set(linear_groups(config))


def test_layers_of_a_shard_begin_with_its_first() -> None:
    wq = torch.zeros(2, 2, dtype=torch.int8)
    digests = GroupDigests(3)
    with pytest.raises(ValueError, match="layer 3 was expected"):
        digests.add(("qkv", 0), wq)
    digests.add(("qkv", 3), wq)
    digests.add(("lm_head", None), wq)
    with pytest.raises(ValueError, match="expected"):
        digests.add(("lm_head", None), wq)
    with pytest.raises(ValueError, match="layer 4 was expected"):
        digests.add(("qkv", 5), wq)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.data())
def test_a_cut_group_has_its_parts_rows_among_those_asked_for(rows: list[int], data: st.DataObject) -> None:
    group = LinearGroup("qkv", 8, tuple((f"part {n}", size) for n, size in enumerate(rows)), bias=True)
    first = data.draw(st.integers(0, group.out_features))
    end = data.draw(st.integers(first, group.out_features))
    names = [name for name, size in group.parts for _ in range(size)][first:end]
    here = cut(group, first, end)
    assert [name for name, size in here.parts for _ in range(size)] == names
    assert [name for name, _ in here.parts] == [name for name, _ in group.parts]
