"""Whole checkpoints: what is read of a quantised one is what is read of one that stores the dequantised numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tsqp.checkpoint import Checkpoint, huggingface, open_checkpoint
from tsqp.checkpoint.safetensors_files import SINGLE_FILE
from tsqp.checkpoint.stored_forms import LEGACY_FILE
from tsqp.cli.models import describe
from tsqp.config.groups import group_keys
from tsqp.errors import CheckpointError, CorruptCheckpoint, UnsupportedModel
from tsqp.model.decoder_layers import Norms
from tsqp.model.quantised import GroupDigests, load_quantised_group
from tsqp.trusted.private import load_private_model
from tsqp.untrusted.paths.field import FieldWorkerWeights

from ..makers import byte_level_tokenizer, make_model
from .references import FORMS

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 64,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "helium": {},
}


def write_both(directory: Path, family: str, form: str, quantised_too: tuple[str, ...] = ()) -> tuple[Path, Path]:
    """A checkpoint in a stored form, and one that stores what its matrices stand for."""
    directory.mkdir(exist_ok=True)
    model = make_model(family, dtype=torch.bfloat16, **SIZES, **FAMILIES[family])
    model.save_pretrained(directory / "plain")
    state = load_file(directory / "plain" / SINGLE_FILE)
    plain, quantised = dict(state), dict(state)
    rng = np.random.default_rng(11)
    for name, tensor in state.items():
        if "proj" in name or name in quantised_too:
            stored, plain[name] = FORMS[form].make(rng, tensor.shape[0], tensor.shape[1])
            del quantised[name]
            quantised |= {name.removesuffix("weight") + part: value for part, value in stored.items()}
    settings = json.loads((directory / "plain" / "config.json").read_text())
    for kind, tensors in (("plain", plain), ("quantised", quantised)):
        (directory / kind).mkdir(exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / kind / SINGLE_FILE)
    settings["quantization_config"] = FORMS[form].quantisation
    (directory / "quantised" / "config.json").write_text(json.dumps(settings))
    return directory / "plain", directory / "quantised"


def eight_bit_digests(checkpoint: Checkpoint) -> dict[str, str]:
    digests = GroupDigests()
    for key in group_keys(checkpoint.config):
        digests.add(key, load_quantised_group(checkpoint, key).wq)
    return {str(name): digest for name, digest in digests.hexdigests().items()}


@pytest.mark.parametrize("form", ["fp8-blocks", "ct-int4-shuffled", "gptq-shuffled", "awq", "nf4-nested-odd", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_and_eight_bit_weights_are_those_of_the_dequantised_numbers(
    tmp_path: Path, family: str, form: str
) -> None:
    """Fused tensors are read by rows, and rows are put into another order, as where nothing is quantised."""
    plain, quantised = map(open_checkpoint, map(str, write_both(tmp_path, family, form)))
    assert plain.config == quantised.config
    for name in plain.shapes:
        assert torch.equal(plain.tensor(name), quantised.tensor(name)), name
        assert quantised.dtype(name) == quantised.tensor(name).dtype
    assert eight_bit_digests(plain) == eight_bit_digests(quantised)
    assert plain.fingerprint() != quantised.fingerprint()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("numbers", [1, 640, 5000])
def test_a_quantised_tensor_comes_in_parts(
    tmp_path: Path, family: str, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part holds so many numbers, or one head where the numbers of heads are moved."""
    monkeypatch.setattr(huggingface, "BLOCK_NUMBERS", numbers)
    checkpoint = open_checkpoint(str(write_both(tmp_path, family, "gptq-shuffled")[1]))
    for name, shape in checkpoint.shapes.items():
        parts = list(checkpoint.row_blocks(name))
        assert torch.equal(torch.cat([rows for _, rows in parts]), checkpoint.tensor(name)), name
        assert [first for first, _ in parts] == [sum(len(rows) for _, rows in parts[:i]) for i in range(len(parts))]
        some = slice(shape[0] // 3, shape[0] // 3 + 3)  # rows that a shard may have, of a head or of two
        found = torch.cat([rows for _, rows in checkpoint.row_blocks(name, some.start, some.stop)])
        assert torch.equal(found, checkpoint.tensor(name)[some]), name
        if "proj" in name:
            unit = checkpoint.config.head_dim if family != "llama" and ("q_proj" in name or "k_proj" in name) else 1
            assert max(rows.numel() for _, rows in parts) <= max(numbers, unit * shape[1])
    assert checkpoint.files() == (tmp_path / "quantised" / SINGLE_FILE,)


def test_both_sides_hold_the_same_weights(tmp_path: Path) -> None:
    plain, quantised = write_both(tmp_path, "llama", "gptq-shuffled")
    for directory in (plain, quantised):
        byte_level_tokenizer().save(str(directory / "tokenizer.json"))
    checkpoint = open_checkpoint(str(quantised))
    norms, table = Norms.load(checkpoint, torch.float32), checkpoint.tensor("model.embed_tokens.weight")
    trusted = load_private_model(checkpoint, table, norms, checks=1, keep_weights=False)
    worker = FieldWorkerWeights.load(open_checkpoint(str(quantised)), torch.device("cpu"))
    assert trusted.digests == worker.digests
    (plain / "generation_config.json").unlink()  # its end tokens are part of the digest; the other has no such file
    assert describe(str(plain), digest=True)["model_digest"] == trusted.digest


def test_model_info_tells_the_form(tmp_path: Path) -> None:
    plain, quantised = write_both(tmp_path, "llama", "fp8-blocks")
    assert describe(str(plain))["stored_as"] == {"bfloat16": 12}
    info = describe(str(quantised))
    assert info["stored_as"] == {"fp8 e4m3, scales of blocks of 24×20": 7, "bfloat16": 5}
    assert info["not_used"] == ["its quantisation of activations"]


def test_embedding_and_head_may_be_quantised(tmp_path: Path) -> None:
    both = write_both(tmp_path, "llama", "fp8-blocks", ("lm_head.weight", "model.embed_tokens.weight"))
    plain, quantised = map(open_checkpoint, map(str, both))
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(plain.tensor(name), quantised.tensor(name))


@pytest.mark.parametrize(("form", "head"), [("gptq-shuffled", True), ("nf4", True), ("gptq-shuffled", False)])
def test_a_quantised_head_is_no_tied_one(tmp_path: Path, form: str, head: bool) -> None:
    plain, quantised = write_both(tmp_path, "llama", form, ("lm_head.weight",) if head else ())
    edit(quantised, tie_word_embeddings=True)
    checkpoint = open_checkpoint(str(quantised))
    assert not checkpoint.config.tied_embeddings  # without a quantised head it differs from the embedding
    assert torch.equal(checkpoint.tensor("lm_head.weight"), open_checkpoint(str(plain)).tensor("lm_head.weight"))


def test_the_fingerprint_is_over_all_that_is_stored_and_how_it_is_read(tmp_path: Path) -> None:
    _, quantised = write_both(tmp_path, "llama", "gptq-shuffled")
    seen = [open_checkpoint(str(quantised)).fingerprint()]
    tensors = {name: tensor.clone() for name, tensor in load_file(quantised / SINGLE_FILE).items()}
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        first = changed[f"model.layers.0.mlp.up_proj.{part}"]
        first[(0,) * first.ndim] += 1
        save_file(changed, quantised / SINGLE_FILE)
        seen.append(open_checkpoint(str(quantised)).fingerprint())
    save_file(tensors, quantised / SINGLE_FILE)
    assert open_checkpoint(str(quantised)).fingerprint() == seen[0]
    edit(quantised, quantization_config=FORMS["gptq-shuffled"].quantisation | {"checkpoint_format": "gptq_v2"})
    seen.append(open_checkpoint(str(quantised)).fingerprint())
    assert len(set(seen)) == 6


def test_biases_of_zeros_of_older_gptq_tools_are_left_out(tmp_path: Path) -> None:
    _, quantised = write_both(tmp_path, "llama", "gptq-shuffled")
    bias = "model.layers.0.self_attn.o_proj.bias"
    tensors = load_file(quantised / SINGLE_FILE)
    save_file(tensors | {bias: torch.zeros(64)}, quantised / SINGLE_FILE)
    assert bias not in open_checkpoint(str(quantised)).shapes
    save_file(tensors | {bias: torch.ones(64)}, quantised / SINGLE_FILE)
    with pytest.raises(UnsupportedModel, match=bias):
        open_checkpoint(str(quantised))


def test_a_configuration_in_a_file_of_its_own_is_read(tmp_path: Path) -> None:
    """As older GPTQ tools wrote it, without a method; the fingerprint of both layouts is one."""
    _, quantised = write_both(tmp_path, "llama", "gptq-shuffled")
    before = open_checkpoint(str(quantised))
    digests, fingerprint = eight_bit_digests(before), before.fingerprint()
    own = {key: value for key, value in FORMS["gptq-shuffled"].quantisation.items() if key != "quant_method"}
    (quantised / LEGACY_FILE).write_text(json.dumps({**own, "damp_percent": 0.01, "model_file_base_name": None}))
    edit(quantised, quantization_config=None)
    after = open_checkpoint(str(quantised))
    assert (eight_bit_digests(after), after.fingerprint()) == (digests, fingerprint)
    (quantised / LEGACY_FILE).write_text(json.dumps({**own, "bits": 5}))
    with pytest.raises(UnsupportedModel, match=r"quantize_config\.json: gptq of 5 bits"):
        open_checkpoint(str(quantised))
    edit(quantised, quantization_config=FORMS["gptq-shuffled"].quantisation)  # which counts where both are there
    assert open_checkpoint(str(quantised)).fingerprint() == fingerprint


@pytest.mark.parametrize(
    ("text", "kind", "told"),
    [
        ('{"bits": 4}', UnsupportedModel, "stores no matrix so"),
        ('{"quant_method": "quip"}', UnsupportedModel, r"quantize_config\.json: the quant_method 'quip'"),
        ("[4]", CorruptCheckpoint, r"quantize_config\.json holds a JSON list"),
        ("{", CorruptCheckpoint, r"quantize_config\.json is not valid JSON"),
    ],
)
def test_such_a_file_that_says_something_else_is_refused(
    text: str, kind: type[CheckpointError], told: str, tmp_path: Path
) -> None:
    plain, _ = write_both(tmp_path, "llama", "gptq-shuffled")
    (plain / LEGACY_FILE).write_text(text)
    with pytest.raises(kind, match=told):
        open_checkpoint(str(plain))


def test_scales_of_activations_and_of_the_cache_are_not_needed(tmp_path: Path) -> None:
    _, quantised = write_both(tmp_path, "llama", "ct-int4")
    tensors = load_file(quantised / SINGLE_FILE)
    extra = ("mlp.up_proj.input_scale", "self_attn.k_scale", "self_attn.v_proj.output_scale")
    more = {f"model.layers.0.{name}": torch.ones(1) for name in extra}
    save_file(tensors | more, quantised / SINGLE_FILE)
    scheme = {"num_bits": 8, "type": "float"}
    edit(quantised, quantization_config=FORMS["ct-int4"].quantisation | {"kv_cache_scheme": scheme})
    assert open_checkpoint(str(quantised)).not_used() == ("its quantisation of the KV cache",)


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
