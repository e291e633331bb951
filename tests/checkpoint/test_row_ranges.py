"""A range of rows of a stored tensor: it is those rows, and of a file little more than those is touched."""

from __future__ import annotations

from collections import Counter

import gguf
import pytest
import torch

from tests.families import tiny_model
from tsqp.checkpoint import gguf as gguf_checkpoint
from tsqp.checkpoint import huggingface, open_checkpoint, synthetic
from tsqp.checkpoint.base import Checkpoint
from tsqp.checkpoint.huggingface import HuggingFaceCheckpoint
from tsqp.checkpoint.synthetic import SHAPES, SyntheticCheckpoint
from tsqp.config.groups import linear_groups
from tsqp.config.shard import Shard
from tsqp.model.quantised import load_quantised_group

from .makers import make_model, write_gguf

FORMS = ["llama", "phi3", "cohere", "helium", "olmo2", "gguf", "gguf-floats", "gguf-qwen2", "synthetic"]


@pytest.fixture(scope="module", params=FORMS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """As they are stored, fused, with heads in another order (rows and biases), in blocks, and made."""
    kind: str = request.param
    if kind == "synthetic":
        return open_checkpoint("synthetic:tiny")
    if not kind.startswith("gguf"):
        return open_checkpoint(str(tiny_model(kind).directory))
    path, family = tmp_path_factory.mktemp("ranges") / "m.gguf", "qwen2" if kind == "gguf-qwen2" else "llama"
    model = make_model(family, hidden_size=64, intermediate_size=96)
    form = None if kind == "gguf-floats" else gguf.GGMLQuantizationType.Q8_0
    write_gguf(path, model, arch=family, matrix_type=form)
    return open_checkpoint(str(path))


@pytest.mark.parametrize("numbers", [1, 1000, 1 << 21])
def test_a_range_is_those_rows(checkpoint: Checkpoint, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gguf_checkpoint, huggingface, synthetic):
        monkeypatch.setattr(module, "BLOCK_NUMBERS", numbers)
    for name, (rows, *_) in checkpoint.shapes.items():
        whole = checkpoint.tensor(name)
        for first, end in {(0, rows), (0, 1), (rows - 1, rows), (rows // 3, 2 * rows // 3 + 1), (1, rows)}:
            parts = list(checkpoint.row_blocks(name, first, end)) if first < end else []
            at = first
            for begun, part in parts:
                assert begun == at
                at += len(part)
            assert at == max(first, end)
            if parts:
                assert torch.equal(torch.cat([part for _, part in parts]), whole[first:end]), (name, first, end)


def test_a_range_of_nothing_is_nothing(checkpoint: Checkpoint) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    rows = checkpoint.shapes[name][0]
    assert list(checkpoint.row_blocks(name, 2, 2)) == []
    for first, end in ((0, rows + 1), (-1, 2), (3, 2)):
        with pytest.raises(ValueError, match="has no rows"):
            checkpoint.row_blocks(name, first, end)


def test_rows_of_synthetic_models_are_whole_words() -> None:
    """Which is what lets a generator be advanced to a row."""
    for config in SHAPES.values():
        assert config.hidden_size % 4 == config.intermediate_size % 4 == config.q_size % 4 == 0


class Rows:
    """A stored tensor of which nothing can be had but a range of rows, which is counted."""

    def __init__(self, tensor: torch.Tensor, numbers: Counter[str], name: str) -> None:
        self._tensor, self._numbers, self._name = tensor, numbers, name

    def __getitem__(self, rows: slice) -> torch.Tensor:
        assert isinstance(rows, slice)
        self._numbers[self._name] += self._tensor[rows].numel()
        return self._tensor[rows]


def counting(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many numbers of each matrix are read from a file, from here on."""
    numbers = Counter[str]()
    if isinstance(checkpoint, HuggingFaceCheckpoint):
        read = checkpoint._files.read
        monkeypatch.setattr(checkpoint._files, "read", lambda name: Rows(read(name), numbers, name))
        return numbers
    assert isinstance(checkpoint, gguf_checkpoint.GgufCheckpoint)
    file, read_rows = checkpoint.file, checkpoint.file.rows

    def rows(name: str, first: int, end: int) -> torch.Tensor:
        found = read_rows(name, first, end)
        numbers[name] += found.numel() if len(file.tensors[name].shape) == 2 else 0
        return found

    monkeypatch.setattr(file, "rows", rows)
    return numbers


@pytest.mark.parametrize("text", ["0..2/1..2of4", "0..2/0..1of3", "1..2/5..6of7"])
def test_of_a_file_a_shard_reads_its_rows_and_the_heads_that_it_divides(
    checkpoint: Checkpoint, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(checkpoint, SyntheticCheckpoint):
        pytest.skip("it has no file")
    config, shard, numbers = checkpoint.config, Shard.parse(text), counting(checkpoint, monkeypatch)
    wanted = heads = 0
    for name, layer in shard.keys(config):
        load_quantised_group(checkpoint, (name, layer), shard)
        group = linear_groups(config)[name]
        wanted += shard.width(group) * group.in_features
        if name == "qkv":  # of Q and K together: two that the slice begins or ends in
            heads += 2 * (config.head_dim - 1) * group.in_features
    found = sum(count for name, count in numbers.items() if "bias" not in name)
    assert wanted <= found <= wanted + heads
    if any(place.order for place in checkpoint._places.values()):  # type: ignore[attr-defined]
        return
    assert found == wanted
