"""Tensors in parts: the parts are the tensor, and whoever loads holds one of them at a time."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import save_file

from tests.families import tiny_model
from tsqp.checkpoint import gguf as gguf_checkpoint
from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.base import Checkpoint
from tsqp.checkpoint.contents import read_line
from tsqp.checkpoint.hf_config import hf_config_of
from tsqp.config.groups import group_keys
from tsqp.model.linear import load_group
from tsqp.model.quantised import load_quantised_group

from .gguf_blocks import write_mix
from .makers import make_model, write_gguf

EMBEDDING = "model.embed_tokens.weight"
BLOCK = 256  # numbers
MB = 1 << 20


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of llama's Q and K are moved, and so are their biases; qwen2's are not."""
    path = tmp_path_factory.mktemp("blocks") / "m.gguf"
    model = make_model(request.param, hidden_size=64, intermediate_size=96)
    write_gguf(path, model, arch=request.param, matrix_type=gguf.GGMLQuantizationType.Q8_0)
    return path


@pytest.fixture(params=[1, BLOCK, 1000])
def checkpoint(quantised: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.setattr(gguf_checkpoint, "BLOCK_NUMBERS", request.param)
    return open_checkpoint(str(quantised))


def test_the_parts_are_the_tensor(checkpoint: Checkpoint) -> None:
    for name, shape in checkpoint.shapes.items():
        rows = list(checkpoint.row_blocks(name))
        assert [first for first, _ in rows] == [sum(len(part) for _, part in rows[:i]) for i in range(len(rows))]
        assert torch.equal(torch.cat([part for _, part in rows]), checkpoint.tensor(name)), name
        assert torch.equal(checkpoint.copy(name), checkpoint.tensor(name))
        assert checkpoint.dtype(name) == checkpoint.tensor(name).dtype
        if len(shape) == 2:
            head = checkpoint.config.head_dim * shape[1]  # the least, where rows of a head are moved
            assert max(part.numel() for _, part in rows) <= max(gguf_checkpoint.BLOCK_NUMBERS, head)


def test_a_copy_is_ones_own_in_the_dtype_asked_for() -> None:
    checkpoint = open_checkpoint(str(tiny_model("llama").directory))
    mapped = checkpoint.tensor(EMBEDDING)
    own = checkpoint.copy(EMBEDDING)
    assert torch.equal(own, mapped)
    assert own.data_ptr() != mapped.data_ptr()
    assert torch.equal(checkpoint.copy(EMBEDDING, torch.bfloat16), mapped.bfloat16())


def test_parts_change_no_bit_of_what_is_quantised(quantised: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(str(quantised))
    keys = group_keys(checkpoint.config)
    at_once = {key: load_quantised_group(checkpoint, key) for key in keys}
    monkeypatch.setattr(gguf_checkpoint, "BLOCK_NUMBERS", BLOCK)
    for key in keys:
        group = load_quantised_group(checkpoint, key)
        assert torch.equal(group.wq, at_once[key].wq)
        assert torch.equal(group.scales, at_once[key].scales)


class Counted:
    """Hands out the parts of a checkpoint, and counts the bytes of those that somebody still has."""

    def __init__(self, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held = self.most = 0
        self._read_blocks = checkpoint._read_blocks
        monkeypatch.setattr(checkpoint, "_read_blocks", self.read_blocks)

    def read_blocks(self, name: str, begin: int, end: int) -> Iterator[tuple[int, torch.Tensor]]:
        for first, rows in self._read_blocks(name, begin, end):
            part = rows.clone()
            del rows
            self.held += part.nbytes
            self.most = max(self.most, self.held)
            weakref.finalize(part, self._let_go, part.nbytes)
            yield first, part
            del part

    def _let_go(self, size: int) -> None:
        self.held -= size


def test_loading_holds_two_parts_at_most(quantised: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is dealt with, and the next one that is made."""
    monkeypatch.setattr(gguf_checkpoint, "BLOCK_NUMBERS", 1024)
    checkpoint = open_checkpoint(str(quantised))
    counted = Counted(checkpoint, monkeypatch)
    for key in group_keys(checkpoint.config):
        load_quantised_group(checkpoint, key)
        load_group(checkpoint, key, torch.bfloat16)
    checkpoint.copy(EMBEDDING)
    assert 0 < counted.most <= 2 * 4 * 1024
    assert counted.held == 0


def test_what_was_read_is_a_line(quantised: Path) -> None:
    checkpoint = open_checkpoint(str(quantised))
    size = quantised.stat().st_size / 1e9
    matrices = sum(len(shape) == 2 for shape in checkpoint.shapes.values())
    line = read_line(checkpoint, 1.25)
    assert line.startswith(f"read 1 file of {size:.2f} GB in 1.2 s; stored as: {matrices} Q8_0, ")
    assert line.endswith(" F32")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mix of forms as real files have it, of 226 million numbers; its largest tensor is 131 MB as float32."""
    path = tmp_path_factory.mktemp("large") / "m.gguf"
    write_mix(path, hidden=2048, inner=6144, layers=4, heads=(16, 4), vocab=16_000)
    return path


@pytest.fixture(scope="module")
def large_directory(large: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape as bfloat16 in a Hugging Face directory."""
    directory, checkpoint = tmp_path_factory.mktemp("large"), open_checkpoint(str(large))
    tensors = {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in checkpoint.shapes.items()}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(hf_config_of(checkpoint.config, "bfloat16")))
    tokenizer = checkpoint.text_format().tokenizer_json
    (directory / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    return directory


def loaded(model: Path, side: str) -> dict[str, int]:
    """What a process of its own says that loads a side; see loading_child.py."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.loading_child", str(model), side],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, int] = json.loads(run.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["large", "large_directory"])
@pytest.mark.parametrize("side", ["field", "private", "bfloat16"])
def test_memory_while_loading_is_what_is_kept_and_little_more(
    stored: str, side: str, request: pytest.FixtureRequest
) -> None:
    """In a process of its own, whose private memory is looked at each millisecond."""
    found = loaded(request.getfixturevalue(stored), side)
    assert found["kept"] >= 200 * MB
    assert found["after"] >= 0.97 * found["kept"]
    assert found["peak"] <= found["kept"] + 80 * MB < found["kept"] + found["largest"]


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["large", "large_directory"])
def test_memory_while_loading_a_quarter_of_the_columns_is_a_quarter(
    stored: str, request: pytest.FixtureRequest
) -> None:
    found = loaded(request.getfixturevalue(stored), "quarter")
    assert 50 * MB <= found["kept"] <= 60 * MB
    assert found["peak"] <= found["kept"] + 80 * MB
