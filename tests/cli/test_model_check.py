"""``tsqp model check``."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors

from tests.checkpoint.extremes import EXTREMES, REQUIRED
from tests.checkpoint.gguf_blocks import write_mix
from tests.commands import Result
from tests.families import tiny_model
from tsqp.checkpoint.gguf_file import GgufFile

Command = Callable[..., Result]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_a_directory_that_runs(tsqp: Command) -> None:
    directory = tiny_model("qwen3").directory
    result = tsqp("model", "check", directory, "--json")
    found = result.json
    assert (result.code, found["runs"], found["refused"]) == (0, True, [])
    assert (found["architecture"], found["rope"], found["layers"]) == ("qwen3", "default", 2)
    assert found["compiled_step"] is False  # of heads with norms
    assert found["files"].startswith("1 file of ")
    assert list(found["modes"]) == ["masked", "masked, with a dealer", "verified", "open", "local"]
    assert all(mode["runs"] for mode in found["modes"].values())
    assert found["modes"]["masked"]["trusted_bytes"] > found["modes"]["verified"]["trusted_bytes"] > 0
    assert found["modes"]["local"]["worker_bytes"] == 0
    assert found["modes"]["open"]["pads_bytes"] == 0
    text = tsqp("model", "check", directory)
    assert text.out.splitlines()[-1] == "it runs"
    assert "masked, with a dealer" in text.out


def test_no_weight_of_a_file_is_read(tsqp: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    write_mix(tmp_path / "m.gguf")
    monkeypatch.setattr(GgufFile, "rows", refuse)
    found = tsqp("model", "check", tmp_path / "m.gguf", "--json").json
    assert found["runs"]
    assert found["stored_as"] == {"Q4_K": 10, "Q6_K": 5, "F32": 5}
    assert found["chat_template"].startswith("none")
    assert found["compiled_step"] is True


def test_a_file_that_is_larger_than_memory(tsqp: Command, tmp_path: Path) -> None:
    """70 billion weights and 128,256 tokens; the weights are a hole in the file."""
    path = tmp_path / "m.gguf"
    write_large(path, layers=80)
    result = tsqp("model", "check", path, "--json")
    found = result.json
    assert (result.code, found["refused"]) == (0, [])
    assert found["parameters"] > 69e9
    masked = found["modes"]["masked"]
    assert 69e9 < masked["worker_bytes"] < 71e9
    assert masked["trusted_bytes"] > masked["worker_bytes"] + 4 * 128_256 * 8192  # and the embedding, as float32


def write_large(path: Path, layers: int) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    hidden, inner, kv, vocab = 8192, 28_672, 1024, 128_256
    numbers = {"block_count": layers, "context_length": 8192, "embedding_length": hidden, "feed_forward_length": inner}
    for key, value in {**numbers, "attention.head_count": 64, "attention.head_count_kv": 8}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(["t", "1", *(f"t{i}" for i in range(vocab - 2))])
    writer.add_array("tokenizer.ggml.merges", ["t 1"])
    shapes = {
        "attn_q": (hidden, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, hidden),
    }
    shapes |= {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
    matrices = {f"blk.{i}.{name}.weight": shape for i in range(layers) for name, shape in shapes.items()}
    matrices |= {"token_embd.weight": (vocab, hidden), "output.weight": (vocab, hidden)}
    q4 = gguf.GGMLQuantizationType.Q4_K
    block, size = gguf.GGML_QUANT_SIZES[q4]
    total = 0
    for name, (rows, width) in matrices.items():
        stored = (rows, width // block * size)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), rows * stored[1], raw_dtype=q4)
        total += rows * stored[1]
    for name in [f"blk.{i}.{norm}.weight" for i in range(layers) for norm in ("attn_norm", "ffn_norm")]:
        writer.add_tensor_info(name, (hidden,), np.dtype(np.float32), 4 * hidden)
        total += 4 * hidden
    writer.add_tensor_info("output_norm.weight", (hidden,), np.dtype(np.float32), 4 * hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + total + 4 * hidden + 4096)


def test_what_is_refused_is_said_with_why(tsqp: Command, tmp_path: Path) -> None:
    settings = {"model_type": "mixtral"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    result = tsqp("model", "check", tmp_path, "--json")
    assert (result.code, result.json["runs"]) == (1, False)
    assert "mixtral" in result.json["refused"][0]
    text = tsqp("model", "check", tmp_path)
    assert text.code == 1
    assert text.out.splitlines()[-1].startswith("refused: ")
    assert "mixtral" in text.out


@pytest.mark.parametrize(("change", "named"), EXTREMES, ids=str)
def test_numbers_that_no_model_has_are_one_line(
    tsqp: Command, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **REQUIRED, **change}))
    result = tsqp("model", "check", tmp_path)
    assert (result.code, result.err) == (1, "")
    assert result.out.splitlines()[-1].startswith("refused: ")
    assert named in result.out.splitlines()[-1]


def test_a_tokenizer_that_is_not_read(tsqp: Command, tmp_path: Path) -> None:
    for file in tiny_model("llama").directory.iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).symlink_to(file)
    result = tsqp("model", "check", tmp_path, "--json")
    assert (result.code, result.json["runs"]) == (1, False)
    assert "tokenizer.json" in result.json["refused"][0]
    assert result.json["modes"]["masked"]["runs"]


def test_products_with_too_many_terms_leave_the_modes_that_have_floats(
    tsqp: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsqp.cli.model_check.MAX_FIELD_TERMS", 100)
    result = tsqp("model", "check", "synthetic:tiny", "--json")
    assert (result.code, result.json["runs"]) == (0, True)
    refused = {name: mode["refused"] for name, mode in result.json["modes"].items() if not mode["runs"]}
    assert set(refused) == {"masked", "masked, with a dealer", "verified"}
    assert refused["masked"] == "group down has 128 inputs, 8-bit products at most 100"


def test_the_hub_is_not_asked(tsqp: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.append(options)
        if repository == "org/other":
            raise errors.LocalEntryNotFoundError("none")
        return str(tiny_model("llama").directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert tsqp("model", "check", "org/name", "--json").json["place"] == str(tiny_model("llama").directory)
    result = tsqp("model", "check", "org/other", "--json")
    assert (result.code, result.json["refused"]) == (
        1,
        ["org/other is no path here and not in the local Hub cache: tsqp model fetch org/other"],
    )
    assert [options["local_files_only"] for options in asked] == [True, True]


def test_the_default_model_is_not_fetched(tsqp: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TSQP_CACHE", str(tmp_path))
    result = tsqp("model", "check", "--json")
    assert (result.code, result.json["refused"]) == (1, ["the default model is not here yet: tsqp model fetch"])
    assert tsqp("model", "check", tmp_path / "none", "--json").code == 1
    assert list(tmp_path.iterdir()) == []
