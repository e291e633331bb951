from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsqp.checkpoint import convert, open_checkpoint
from tsqp.checkpoint.convert import convert_gguf, remove_unfinished
from tsqp.errors import CheckpointError, CorruptCheckpoint, UnsupportedModel

from .makers import VOCAB, byte_level_fields, make_model, write_gguf

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "llama-biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "arcee": {},
    "olmo2": {},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_computes_the_same_from_it(tmp_path: Path, variant: str) -> None:
    family = variant.partition("-")[0]
    model = make_model(family, **VARIANTS[variant])
    write_gguf(tmp_path / "m.gguf", model, arch=family, tokenizer=byte_level_fields())
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    original, converted = open_checkpoint(str(tmp_path / "m.gguf")), open_checkpoint(str(tmp_path / "hf"))
    assert converted.config == original.config
    assert converted.text_format() == original.text_format()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert theirs.dtype == torch.float32
    ids = torch.arange(0, VOCAB, 20)[None]
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, model(ids).logits)
    assert theirs.generation_config.eos_token_id == VOCAB - 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float_dtypes_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_model("llama", dtype=dtype)
    write_gguf(tmp_path / "m.gguf", model, tokenizer=byte_level_fields())
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    assert open_checkpoint(str(tmp_path / "hf")).tensor("lm_head.weight").dtype == dtype
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == dtype


def test_shards_hold_the_same(tmp_path: Path) -> None:
    model = make_model("llama", intermediate_size=64)
    write_gguf(tmp_path / "m.gguf", model, tokenizer=byte_level_fields(), matrix_type=gguf.GGMLQuantizationType.Q4_1)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "one")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "many", shard_bytes=30_000)
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 2
    one, many = open_checkpoint(str(tmp_path / "one")), open_checkpoint(str(tmp_path / "many"))
    assert one.fingerprint() == many.fingerprint()
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "many").state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor, open_checkpoint(str(tmp_path / "m.gguf")).tensor(name))


def test_nothing_is_left_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf", make_model("llama"), tokenizer={**byte_level_fields(), "eos_token_id": VOCAB})
    with pytest.raises(CorruptCheckpoint, match="eos_token_id"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out" / "hf")
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(CheckpointError, match="exists already"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "_write_settings", killed)
    with pytest.raises(KeyboardInterrupt):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out" / "hf")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_a_kill_leaves_is_removed_later(tmp_path: Path) -> None:
    (tmp_path / ".converting-abc").mkdir()
    (tmp_path / "kept").mkdir()
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("family", ["granite", "seed_oss"])
def test_a_family_that_is_not_written_is_refused_before_anything_is(tmp_path: Path, family: str) -> None:
    scales = {"logit_scale": 8.0} if family == "granite" else {}
    write_gguf(tmp_path / "m.gguf", make_model(family), arch=family, metadata=scales)
    with pytest.raises(UnsupportedModel, match=f"{family} is not implemented"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
