"""The copy for llama.cpp is refused for what it does not write, before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGMLQuantizationType

from tests.families import tiny_model
from tsqp.bench.gguf_copy import write_gguf
from tsqp.checkpoint import open_checkpoint
from tsqp.errors import UnsupportedModel


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("olmo2", "not implemented for olmo2"),
        ("granite", "not implemented for granite"),
        ("cohere", "not implemented for cohere"),
        ("yarn", "not implemented for yarn rotary embeddings"),
        ("dynamic-rope", "not implemented for dynamic rotary embeddings"),
        ("gemma2", "no sliding windows"),
    ],
)
def test_what_is_not_written_is_refused_by_name(tmp_path: Path, family: str, message: str) -> None:
    checkpoint = open_checkpoint(str(tiny_model(family).directory))
    with pytest.raises(UnsupportedModel, match=message):
        write_gguf(checkpoint, GGMLQuantizationType.F32, tmp_path / "copy.gguf")
    assert not (tmp_path / "copy.gguf").exists()
