from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from tests.families import byte_tokenizer
from tsqp import LLM, ComputeConfig
from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.huggingface import INDEX_FILE, SINGLE_FILE
from tsqp.errors import CheckpointNotFound, CorruptCheckpoint, TsqpWarning, UnsupportedModel

from .makers import SMALL, byte_level_tokenizer, make_model

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "mistral": {"sliding_window": 9},
    "qwen2": {},
    "qwen2-tied": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "qwen3-biases": {"attention_bias": True, "head_dim": 16},
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """An untied llama with a tokenizer."""
    directory = tmp_path / "tiny"
    make_model("llama").save_pretrained(directory)
    byte_level_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def _edit(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**value, **changes}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", FAMILIES)
def test_every_tensor_is_that_of_transformers(tmp_path: Path, variant: str, dtype: torch.dtype) -> None:
    model = make_model(variant.partition("-")[0], dtype=dtype, **FAMILIES[variant])
    model.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / INDEX_FILE).exists()
    single, sharded = open_checkpoint(str(tmp_path / "single")), open_checkpoint(str(tmp_path / "sharded"))
    assert single.config == sharded.config
    for name, expected in model.state_dict().items():  # lists a tied head too
        for checkpoint in (single, sharded):
            got = checkpoint.tensor(name)
            assert got.dtype == dtype
            assert torch.equal(got, expected), name
    assert single.fingerprint() == sharded.fingerprint()
    assert len(single.fingerprint()) == 64


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A Gemma 3 of text and pictures, as transformers holds it and in its directory."""
    text = {**SMALL, "head_dim": 8, "sliding_window": 12, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    torch.manual_seed(5)
    model = Gemma3ForConditionalGeneration(config).eval()
    directory = tmp_path_factory.mktemp("pictures")
    model.save_pretrained(directory)
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    return model, directory


@pytest.mark.parametrize("earlier", [False, True], ids=["present-names", "earlier-names"])
def test_the_text_part_of_a_model_of_text_and_pictures(
    pictures: tuple[Any, Path], tmp_path: Path, earlier: bool
) -> None:
    model, directory = pictures
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    if earlier:
        tensors = {
            (
                name.replace("model.language_model.", "language_model.model.")
                .replace("model.vision_tower", "vision_tower")
                .replace("model.multi_modal_projector", "multi_modal_projector")
            ): tensor
            for name, tensor in load_file(tmp_path / SINGLE_FILE).items()
        }
        assert "language_model.model.norm.weight" in tensors
        save_file(tensors, tmp_path / SINGLE_FILE)
    assert open_checkpoint(str(tmp_path)).left_out == ("multi_modal_projector", "vision_tower")
    prompt = list(range(30))
    with (
        pytest.warns(TsqpWarning, match="not multi_modal_projector, vision_tower"),
        LLM(str(tmp_path), protection="local", compute=ComputeConfig(dtype="float32")) as llm,
    ):
        ours = llm.logits(prompt)
    with torch.no_grad():
        theirs = model(torch.tensor([prompt])).logits[0]
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_an_unknown_part_of_a_model_of_pictures_is_refused(pictures: tuple[Any, Path], tmp_path: Path) -> None:
    shutil.copytree(pictures[1], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / SINGLE_FILE)
    save_file(tensors | {"model.audio_tower.weight": torch.ones(2)}, tmp_path / SINGLE_FILE)
    with pytest.raises(UnsupportedModel, match="audio_tower"):
        open_checkpoint(str(tmp_path))


def test_fingerprint_tells_weights_apart(tiny: Path) -> None:
    before = open_checkpoint(str(tiny)).fingerprint()
    tensors = {name: tensor.clone() for name, tensor in load_file(tiny / SINGLE_FILE).items()}
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, tiny / SINGLE_FILE)
    assert open_checkpoint(str(tiny)).fingerprint() != before


def test_a_stored_head_that_differs_is_no_tied_head(tiny: Path) -> None:
    _edit(tiny / "config.json", tie_word_embeddings=True)
    assert not open_checkpoint(str(tiny)).config.tied_embeddings
    tensors = load_file(tiny / SINGLE_FILE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tiny / SINGLE_FILE)
    assert open_checkpoint(str(tiny)).config.tied_embeddings


def test_rotary_frequencies_of_older_exports_are_ignored(tiny: Path) -> None:
    tensors = load_file(tiny / SINGLE_FILE) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors, tiny / SINGLE_FILE)
    open_checkpoint(str(tiny))


def test_truncated_or_garbage_weights(tiny: Path) -> None:
    whole = (tiny / SINGLE_FILE).read_bytes()
    for content in (whole[:-100], whole[:50], b"", b"garbage" * 100, b"\xff" * 64):
        (tiny / SINGLE_FILE).write_bytes(content)
        with pytest.raises(CorruptCheckpoint, match=SINGLE_FILE):
            open_checkpoint(str(tiny))


@pytest.mark.parametrize("content", ["{", "[1]", "\xff", '"text"'])
def test_garbage_config(tiny: Path, content: str) -> None:
    (tiny / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CorruptCheckpoint, match=r"config\.json"):
        open_checkpoint(str(tiny))


@pytest.mark.parametrize(
    ("name", "tensor", "error"),
    [
        ("model.norm.weight", None, CorruptCheckpoint),
        ("lm_head.weight", None, CorruptCheckpoint),
        ("model.norm.weight", torch.ones(33), CorruptCheckpoint),
        ("model.layers.0.mlp.up_proj.weight", torch.ones(32, 48), CorruptCheckpoint),
        ("model.layers.0.mlp.up_proj.weight", torch.ones(48, 32, dtype=torch.int8), UnsupportedModel),
        ("model.layers.0.self_attn.q_norm.weight", torch.ones(8), UnsupportedModel),
        ("model.layers.3.mlp.up_proj.weight", torch.ones(48, 32), UnsupportedModel),
    ],
)
def test_stored_tensors_must_be_those_of_the_config(
    tiny: Path, name: str, tensor: torch.Tensor | None, error: type[Exception]
) -> None:
    tensors = load_file(tiny / SINGLE_FILE)
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, tiny / SINGLE_FILE)
    with pytest.raises(error, match=name):
        open_checkpoint(str(tiny))


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", "model.bin", "..", ""])
def test_the_index_may_not_leave_its_directory(tiny: Path, name: str) -> None:
    (tiny / SINGLE_FILE).rename(tiny.parent / "other.safetensors")
    (tiny / INDEX_FILE).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(CorruptCheckpoint, match="not a safetensors file of its directory"):
        open_checkpoint(str(tiny))


def test_missing_shard_and_empty_index(tiny: Path) -> None:
    (tiny / SINGLE_FILE).unlink()
    (tiny / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(CorruptCheckpoint, match="is missing"):
        open_checkpoint(str(tiny))
    (tiny / INDEX_FILE).write_text("{}")
    with pytest.raises(CorruptCheckpoint, match="weight_map"):
        open_checkpoint(str(tiny))


def test_pickled_weights_are_refused(tiny: Path) -> None:
    (tiny / SINGLE_FILE).unlink()
    with pytest.raises(CheckpointNotFound, match=SINGLE_FILE):
        open_checkpoint(str(tiny))
    (tiny / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match="pickled"):
        open_checkpoint(str(tiny))


def test_a_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"config\.json"):
        open_checkpoint(str(tmp_path))


def test_text_format(tiny: Path) -> None:
    _edit(tiny / "tokenizer_config.json", bos_token={"content": "<|im_start|>"}, eos_token="<|im_end|>", pad_token=None)
    _edit(tiny / "generation_config.json", eos_token_id=[5, 6])
    text = open_checkpoint(str(tiny)).text_format()
    assert text.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    end = byte_level_tokenizer().token_to_id("<|im_end|>")
    assert text.eos_token_ids == (5, 6, end)
    assert text.chat_template is None
    assert text.tokenizer_json == (tiny / "tokenizer.json").read_text()


def test_eos_from_config_without_generation_config(tiny: Path) -> None:
    (tiny / "generation_config.json").unlink()
    _edit(tiny / "config.json", eos_token_id=9)
    assert open_checkpoint(str(tiny)).text_format().eos_token_ids == (9,)
    _edit(tiny / "config.json", eos_token_id="nine")
    with pytest.raises(CorruptCheckpoint, match="eos_token_id"):
        open_checkpoint(str(tiny)).text_format()


def test_chat_template_places(tiny: Path) -> None:
    checkpoint = open_checkpoint(str(tiny))
    settings = tiny / "tokenizer_config.json"
    _edit(settings, chat_template="of the settings")
    assert checkpoint.text_format().chat_template == "of the settings"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    _edit(settings, chat_template=named)
    assert checkpoint.text_format().chat_template == "plain"
    assert checkpoint.text_format().tool_chat_template == "tools"
    _edit(settings, chat_template=[{"name": ["default"], "template": "listed"}, 5, *named])
    assert checkpoint.text_format().chat_template == "plain"
    _edit(settings, chat_template=3)
    with pytest.raises(CorruptCheckpoint, match="chat_template"):
        checkpoint.text_format()
    (tiny / "chat_template.jinja").write_text("of the file")
    _edit(settings, chat_template=named)
    assert checkpoint.text_format().chat_template == "of the file"
    assert checkpoint.text_format().tool_chat_template is None
    (tiny / "additional_chat_templates").mkdir()
    (tiny / "additional_chat_templates" / "tool_use.jinja").write_text("tools of the file")
    assert checkpoint.text_format().tool_chat_template == "tools of the file"


def test_missing_or_broken_tokenizer(tiny: Path) -> None:
    checkpoint = open_checkpoint(str(tiny))
    (tiny / "tokenizer.json").write_text("{")
    with pytest.raises(CorruptCheckpoint, match=r"tokenizer\.json"):
        checkpoint.text_format()
    (tiny / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModel, match="save_pretrained"):
        checkpoint.text_format()


@pytest.mark.parametrize(
    "content", ['{"added_tokens": [3], "model": 4}', '{"added_tokens": 5}', '{"model": {"vocab": ["a"]}}', "{}"]
)
def test_end_token_of_an_odd_tokenizer_is_not_found(tiny: Path, content: str) -> None:
    (tiny / "tokenizer.json").write_text(content)
    _edit(tiny / "tokenizer_config.json", eos_token="</s>")
    _edit(tiny / "generation_config.json", eos_token_id=4)
    assert open_checkpoint(str(tiny)).text_format().eos_token_ids == (4,)


def test_unknown_tensor_name(tiny: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match="nonsense"):
        open_checkpoint(str(tiny)).tensor("nonsense")
