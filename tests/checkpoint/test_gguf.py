from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tsqp import LLM, ComputeConfig
from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.gguf_rope import ROPE_FACTORS, ROPE_LONG, ROPE_SHORT, llama3_factors
from tsqp.checkpoint.hf_config import parse_config
from tsqp.config.model import RopeConfig
from tsqp.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint, UnsupportedModel

from .makers import byte_level_fields, make_model, write_gguf

PARTIAL = {"rope_type": "default", "rope_theta": 10_000.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 16, "attention_bias": False},
}
LLAMA3 = RopeConfig(500_000.0, "llama3", factor=32.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_is_that_of_transformers(tmp_path: Path, variant: str, dtype: torch.dtype) -> None:
    family = variant.partition("-")[0]
    model = make_model(family, dtype=dtype, **VARIANTS[variant])
    path = tmp_path / "model.gguf"
    write_gguf(path, model, arch=family)
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.config == parse_config(model.config.to_dict())
    for name, expected in model.state_dict().items():
        got = checkpoint.tensor(name)
        assert got.dtype == (dtype if got.ndim == 2 else torch.float32)  # vectors are float32 in every GGUF
        assert torch.equal(got, expected.to(got.dtype)), name
    assert checkpoint.fingerprint() == open_checkpoint(str(path)).fingerprint()


# The metadata of each, as llama.cpp's converter writes them: architecture, type and options of the model, metadata.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "smollm3": ("smollm3", "smollm3", {"num_hidden_layers": 5, "pad_token_id": None}, {}),
    "seed_oss": ("seed_oss", "seed_oss", {"head_dim": 16, "attention_out_bias": False}, {}),
    "seed_oss-biases": ("seed_oss", "seed_oss", {"head_dim": 16, "attention_out_bias": True}, {}),
    "arcee": ("arcee", "arcee", {}, {}),
    "phi3": (
        "phi3",
        "phi3",
        {"sliding_window": 9, "pad_token_id": None},
        {"attention.sliding_window": 9, "rope.dimension_count": 8},
    ),
    "phi3-partial": (
        "phi3",
        "phi3",
        {"hidden_size": 64, "pad_token_id": None, "rope_parameters": {**PARTIAL, "partial_rotary_factor": 0.75}},
        {"rope.dimension_count": 12},
    ),
    "granite": (
        "granite",
        "granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.25,
            "attention_multiplier": 0.5,
            "logits_scaling": 8.0,
        },
        {"embedding_scale": 12.0, "residual_scale": 0.25, "attention.scale": 0.5, "logit_scale": 8.0},
    ),
    "olmo2": ("olmo2", "olmo2", {}, {}),
    "gemma2": (
        "gemma2",
        "gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 9, "final_logit_softcapping": 20.0},
        {"attention.sliding_window": 9, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 20.0},
    ),
    "gemma2-27b": (
        "gemma2",
        "gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 8, "sliding_window": 4096, "num_hidden_layers": 46},
        {},
    ),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 9,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        {"attention.sliding_window": 9, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    ),
    "gemma3-said": (
        "gemma3",
        "gemma3_text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 9,
            "final_logit_softcapping": 5.0,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            },
        },
        {
            "attention.sliding_window": 9,
            "attention.sliding_window_pattern": [False, True, True],
            "rope.freq_base_swa": 2e4,
            "final_logit_softcapping": 5.0,
        },
    ),
    "command-r": ("command-r", "cohere", {"logit_scale": 0.5}, {"logit_scale": 0.5}),
    "command-r-normed": ("command-r", "cohere", {"use_qk_norm": True}, {"logit_scale": 0.0625}),
    "cohere2": (
        "cohere2",
        "cohere2",
        {"sliding_window": 9, "num_hidden_layers": 5, "logit_scale": 0.25},
        {"attention.sliding_window": 9, "logit_scale": 0.25},
    ),
}


@pytest.mark.parametrize("variant", ARCHITECTURES)
def test_a_file_is_what_the_same_model_is_from_safetensors(tmp_path: Path, variant: str) -> None:
    architecture, family, options, metadata = ARCHITECTURES[variant]
    model = make_model(family, **options)
    model.save_pretrained(tmp_path / "hf")
    write_gguf(tmp_path / "m.gguf", model, arch=architecture, metadata=metadata)
    ours, theirs = open_checkpoint(str(tmp_path / "m.gguf")), open_checkpoint(str(tmp_path / "hf"))
    added = theirs.config.norm_offset  # which the norms of a GGUF have already
    assert ours.config == replace(theirs.config, norm_offset=0.0)
    assert ours.shapes == theirs.shapes
    for name in ours.shapes:
        expected = theirs.tensor(name) + (added if "norm" in name else 0)
        assert torch.equal(ours.tensor(name), expected), name
    assert ours.fingerprint() == open_checkpoint(str(tmp_path / "m.gguf")).fingerprint()


def test_layers_with_a_window_may_have_another_base(tmp_path: Path) -> None:
    architecture, family, options, metadata = ARCHITECTURES["cohere2"]
    model = make_model(family, **options)
    write_gguf(tmp_path / "m.gguf", model, arch=architecture, metadata=metadata | {"rope.freq_base_swa": 777.0})
    config = open_checkpoint(str(tmp_path / "m.gguf")).config
    ropes = [config.ropes[config.rope_index(layer)] for layer in range(5)]
    assert [(rope.kind, rope.theta) for rope in ropes[:3]] == [("default", 777.0)] * 3
    assert [rope.kind for rope in ropes[3:]] == ["none", "default"]


def test_logits_of_norms_with_their_offset_added(tmp_path: Path) -> None:
    """Gemma's, of which a GGUF holds the sum: near transformers', as from safetensors."""
    architecture, family, options, metadata = ARCHITECTURES["gemma3"]
    model = make_model(family, **options)
    write_gguf(tmp_path / "m.gguf", model, arch=architecture, metadata=metadata, tokenizer=byte_level_fields())
    prompt = list(range(40))
    with LLM(str(tmp_path / "m.gguf"), protection="local", compute=ComputeConfig(dtype="float32")) as llm:
        ours = llm.logits(prompt)
    with torch.no_grad():
        theirs = model(torch.tensor([prompt])).logits[0]
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1], ids=lambda k: k.name)
def test_quantised_blocks_become_the_float32_they_stand_for(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    model = make_model("qwen2", intermediate_size=64)
    write_gguf(tmp_path / "q.gguf", model, arch="qwen2", matrix_type=kind)
    name = "model.layers.1.mlp.down_proj.weight"
    got = open_checkpoint(str(tmp_path / "q.gguf")).tensor(name)
    blocks = gguf.quantize(model.state_dict()[name].numpy(), kind)
    assert torch.equal(got, torch.from_numpy(gguf.dequantize(blocks, kind)))


def test_mistral_under_the_name_of_llama(tmp_path: Path) -> None:
    model = make_model("mistral", sliding_window=9)
    write_gguf(tmp_path / "m.gguf", model, metadata={"attention.sliding_window": 9})
    assert open_checkpoint(str(tmp_path / "m.gguf")).config == parse_config(model.config.to_dict())


def test_linear_rope(tmp_path: Path) -> None:
    model = make_model("llama", rope_parameters={"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0})
    write_gguf(tmp_path / "m.gguf", model, metadata={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert open_checkpoint(str(tmp_path / "m.gguf")).config.rope == RopeConfig(5000.0, "linear", 4.0)


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_factor_without_a_type_is_linear(tmp_path: Path, key: str) -> None:
    model = make_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 5000.0})

    def read(metadata: dict[str, Any]) -> RopeConfig:
        write_gguf(tmp_path / "m.gguf", model, metadata=metadata)
        return open_checkpoint(str(tmp_path / "m.gguf")).config.rope

    assert read({key: 4.0}) == RopeConfig(5000.0, "linear", 4.0)
    assert read({"rope.scale_linear": 2.0, key: 4.0}) == RopeConfig(5000.0, "linear", 4.0)  # the newer key counts
    for nothing in (0.0, 1.0):
        assert read({key: nothing}) == RopeConfig(5000.0)
    assert read({"rope.scaling.type": "none", key: 4.0}) == RopeConfig(5000.0)
    with pytest.raises(CorruptCheckpoint, match="must be positive"):
        read({key: -4.0})


def test_a_factor_beside_the_divisors_of_each_frequency(tmp_path: Path) -> None:
    model = make_model("llama", head_dim=64, rope_parameters=_rope_parameters(LLAMA3))
    factors = {ROPE_FACTORS: np.array(llama3_factors(LLAMA3, 64), dtype=np.float32)}
    for nothing in (0.0, 1.0):
        write_gguf(tmp_path / "m.gguf", model, metadata={"rope.scaling.factor": nothing}, extra_tensors=factors)
        assert open_checkpoint(str(tmp_path / "m.gguf")).config == parse_config(model.config.to_dict())
    write_gguf(tmp_path / "m.gguf", model, metadata={"rope.scaling.factor": 32.0}, extra_tensors=factors)
    with pytest.raises(UnsupportedModel, match="linear rope scaling together with"):
        open_checkpoint(str(tmp_path / "m.gguf"))


def test_yarn(tmp_path: Path) -> None:
    """The keys as llama.cpp's converter writes them, and the attention factor as llama.cpp computes it."""
    parameters = {
        "rope_type": "yarn",
        "rope_theta": 5000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16.0,
    }
    model = make_model("llama", rope_parameters=parameters)
    metadata = {"type": "yarn", "factor": 4.0, "original_context_length": 128, "yarn_beta_fast": 16.0}
    write_gguf(tmp_path / "m.gguf", model, metadata={f"rope.scaling.{key}": value for key, value in metadata.items()})
    ours = open_checkpoint(str(tmp_path / "m.gguf")).config
    assert ours == parse_config(model.config.to_dict())
    assert (ours.max_positions, ours.rope.attention_factor) == (512, 0.1 * math.log(4.0) + 1)


def test_longrope(tmp_path: Path) -> None:
    short, long = [1.0, 1.5, 2.0, 2.5], [2.0, 3.0, 4.0, 5.5]
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 5000.0,
        "attention_factor": 1.25,
        "original_max_position_embeddings": 64,
        "short_factor": short,
        "long_factor": long,
    }
    model = make_model("llama", rope_parameters=parameters)
    metadata = {"rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.25}
    tensors = {ROPE_SHORT: np.array(short, np.float32), ROPE_LONG: np.array(long, np.float32)}
    write_gguf(tmp_path / "m.gguf", model, metadata=metadata, extra_tensors=tensors)
    assert open_checkpoint(str(tmp_path / "m.gguf")).config == parse_config(model.config.to_dict())
    write_gguf(tmp_path / "m.gguf", model, metadata=metadata, extra_tensors={ROPE_LONG: tensors[ROPE_LONG]})
    with pytest.raises(CorruptCheckpoint, match=ROPE_SHORT):
        open_checkpoint(str(tmp_path / "m.gguf"))
    tensors[ROPE_LONG][2] = 0
    write_gguf(tmp_path / "m.gguf", model, metadata=metadata, extra_tensors=tensors)
    with pytest.raises(CorruptCheckpoint, match="positive"):
        open_checkpoint(str(tmp_path / "m.gguf"))


def test_longrope_of_a_part_of_each_head(tmp_path: Path) -> None:
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 5000.0,
        "attention_factor": 1.25,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.5, 2.0],
        "long_factor": [2.0, 3.0, 4.5],
    }
    options: dict[str, Any] = {"original_max_position_embeddings": 64, "pad_token_id": None, "sliding_window": None}
    model = make_model("phi3", rope_parameters=parameters, **options)
    keys = {"rope.dimension_count": 6, "rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.25}
    factors = {
        ROPE_SHORT: np.array(parameters["short_factor"], np.float32),
        ROPE_LONG: np.array(parameters["long_factor"], np.float32),
    }
    write_gguf(tmp_path / "m.gguf", model, arch="phi3", metadata=keys, extra_tensors=factors)
    ours = open_checkpoint(str(tmp_path / "m.gguf")).config
    assert ours == parse_config(model.config.to_dict())
    assert (ours.rope.rotary_dim, ours.rope.kind) == (6, "longrope")


def _rope_parameters(rope: RopeConfig) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": rope.theta,
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_positions,
    }


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_is_read_from_its_factors(tmp_path: Path, factor: float) -> None:
    rope = RopeConfig(500_000.0, "llama3", factor=factor)
    model = make_model("llama", head_dim=64, rope_parameters=_rope_parameters(rope))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    plain = 1.0 / rope.theta ** (torch.arange(0, 64, 2).float() / 64)
    factors = (plain / scaled).numpy()
    np.testing.assert_allclose(llama3_factors(rope, 64), factors, rtol=1e-5)
    write_gguf(tmp_path / "m.gguf", model, extra_tensors={ROPE_FACTORS: factors})
    assert open_checkpoint(str(tmp_path / "m.gguf")).config == parse_config(model.config.to_dict())


def test_arithmetic_that_no_bound_foresaw(tmp_path: Path) -> None:
    """The largest divisor is rounded to 4 decimals, and so to 0."""
    write_gguf(tmp_path / "m.gguf", make_model("llama"), extra_tensors={ROPE_FACTORS: np.full(4, 1e-6, np.float32)})
    with pytest.raises(CorruptCheckpoint, match="its numbers make no model"):
        open_checkpoint(str(tmp_path / "m.gguf"))


def test_other_rope_factors_are_refused(tmp_path: Path) -> None:
    model = make_model("llama", head_dim=64, rope_parameters=_rope_parameters(LLAMA3))
    factors = np.array(llama3_factors(LLAMA3, 64), dtype=np.float32)
    factors[20] *= 1.01
    write_gguf(tmp_path / "m.gguf", model, extra_tensors={ROPE_FACTORS: factors})
    with pytest.raises(UnsupportedModel, match=ROPE_FACTORS):
        open_checkpoint(str(tmp_path / "m.gguf"))
    write_gguf(tmp_path / "ones.gguf", model, extra_tensors={ROPE_FACTORS: np.ones(32, dtype=np.float32)})
    assert open_checkpoint(str(tmp_path / "ones.gguf")).config.rope == RopeConfig(500_000.0)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_rope_factors_that_divide_nothing(tmp_path: Path, value: float) -> None:
    model = make_model("llama", head_dim=64, rope_parameters=_rope_parameters(LLAMA3))
    for factors in (np.full(32, value, np.float32), np.array([1.0] * 31 + [value], np.float32)):
        write_gguf(tmp_path / "m.gguf", model, extra_tensors={ROPE_FACTORS: factors})
        with pytest.raises(CorruptCheckpoint, match="positive"):
            open_checkpoint(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"expert_count": 8}, "mixture of experts"),
        ({"rope.scaling.type": "dynamic", "rope.scaling.factor": 4.0}, "dynamic"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_ext_factor": 0.5}, "ext_factor"),
        ({"rope.dimension_count": 4}, "part of each head"),
        ({"attention.value_length": 4}, "value heads"),
        ({"block_count": 2**30}, "block_count: 1073741824 layers"),
    ],
)
def test_refuses_by_name(tmp_path: Path, metadata: dict[str, Any], named: str) -> None:
    write_gguf(tmp_path / "m.gguf", make_model("llama"), metadata=metadata)
    with pytest.raises(UnsupportedModel, match=named):
        open_checkpoint(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize("architecture", ["gemma3n", "mistral3", "falcon"])
def test_refuses_other_architectures_by_name(tmp_path: Path, architecture: str) -> None:
    write_gguf(tmp_path / "m.gguf", arch=architecture, tokenizer=byte_level_fields())
    with pytest.raises(UnsupportedModel, match=f"'{architecture}' is not implemented"):
        open_checkpoint(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("variant", "metadata", "error", "named"),
    [
        ("gemma3", {"attn_logit_softcapping": 50.0}, UnsupportedModel, "attn_logit_softcapping"),
        ("granite", {"rope.scaling.finetuned": False}, UnsupportedModel, "without rotary"),
        ("olmo2", {"attention.sliding_window": 9}, UnsupportedModel, "sliding_window"),
        ("gemma2", {"final_logit_softcapping": 0.0}, CorruptCheckpoint, "final_logit_softcapping"),
        ("gemma3", {"attention.sliding_window_pattern": [True]}, CorruptCheckpoint, "sliding_window_pattern"),
        ("gemma3", {"attention.sliding_window": -9}, CorruptCheckpoint, "sliding_window"),
        ("granite", {"residual_scale": -1.0}, CorruptCheckpoint, "residual_scale"),
        ("phi3", {"rope.dimension_count": 10}, CorruptCheckpoint, "dimension_count"),
        ("phi3", {"rope.dimension_count": 3}, CorruptCheckpoint, "dimension_count"),
        ("command-r", {"attention.layer_norm_epsilon": None}, CorruptCheckpoint, "layer_norm_epsilon"),
        ("command-r", {"logit_scale": None}, CorruptCheckpoint, "logit_scale"),
        ("granite", {"logit_scale": None}, CorruptCheckpoint, "logit_scale"),
    ],
    ids=str,
)
def test_what_a_family_does_not_allow(
    tmp_path: Path, variant: str, metadata: dict[str, Any], error: type[Exception], named: str
) -> None:
    architecture, family, options, usual = ARCHITECTURES[variant]
    write_gguf(tmp_path / "m.gguf", make_model(family, **options), arch=architecture, metadata=usual | metadata)
    with pytest.raises(error, match=named):
        open_checkpoint(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"block_count": None}, "block_count"),
        ({"block_count": 4}, r"blk\.3"),
        ({"embedding_length": 64}, "shape"),
        ({"embedding_length": "32"}, "embedding_length"),
        ({"attention.head_count": 0}, "head_count"),
        ({"attention.head_count_kv": 3}, "KV heads"),
        ({"attention.head_count_kv": [2, 2, 2]}, "head_count_kv"),
        ({"rope.freq_base": -1.0}, "freq_base"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 0.5}, "yarn"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.yarn_beta_slow": -1.0}, "beta_slow"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, "rope_factors_short"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 0.0}, "attn_factor"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "epsilon"),
        ({"rope.freq_base": np.float64(1e300)}, "freq_base is 1e"),
        ({"rope.freq_base": np.float64(1e-300)}, "freq_base is 1e"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": np.float64(1e300)}, "factor is 1e"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 1e29}, "context of"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 9.9e29}, "attention"),
        ({"context_length": 2**31}, "context_length"),
        ({"attention.sliding_window": 2**31}, "sliding_window"),
    ],
)
def test_names_the_bad_key(tmp_path: Path, metadata: dict[str, Any], named: str) -> None:
    write_gguf(tmp_path / "m.gguf", make_model("llama"), metadata=metadata)
    with pytest.raises(CorruptCheckpoint, match=named):
        open_checkpoint(str(tmp_path / "m.gguf"))


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """A model in three parts, as llama-gguf-split names them."""
    model = make_model("llama", num_hidden_layers=1)
    tensors = len(model.state_dict())
    write_gguf(tmp_path / "m.gguf", model, tokenizer=byte_level_fields(), split_tensors=tensors // 2 - 1)
    found = sorted(tmp_path.glob("m-*.gguf"))
    assert [path.name for path in found] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return found


def test_a_split_file_is_opened_by_its_first_part(parts: list[Path], tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf", make_model("llama", num_hidden_layers=1), tokenizer=byte_level_fields())
    whole, split = open_checkpoint(str(tmp_path / "whole.gguf")), open_checkpoint(str(parts[0]))
    assert split.config == whole.config
    assert split.fingerprint() == whole.fingerprint()
    assert split.text_format() == whole.text_format()
    for name in whole.shapes:
        assert torch.equal(split.tensor(name), whole.tensor(name))


def test_another_part_names_the_first(parts: list[Path]) -> None:
    with pytest.raises(CheckpointError, match=r"is part 2 of 3; name the first, .*m-00001-of-00003\.gguf"):
        open_checkpoint(str(parts[1]))


def test_missing_parts_are_named(parts: list[Path]) -> None:
    parts[2].unlink()
    with pytest.raises(CheckpointNotFound, match=r"of which m-00003-of-00003\.gguf are not beside it"):
        open_checkpoint(str(parts[0]))
    parts[1].unlink()
    with pytest.raises(CheckpointNotFound, match=r"of which m-00002-of-00003\.gguf and 1 more are"):
        open_checkpoint(str(parts[0]))


def test_a_renamed_part_is_told(parts: list[Path]) -> None:
    renamed = parts[0].rename(parts[0].with_name("renamed.gguf"))
    with pytest.raises(CorruptCheckpoint, match=r"part 1 of 3, but its name does not end in -00001-of-00003\.gguf"):
        open_checkpoint(str(renamed))


def test_parts_that_do_not_belong_together(parts: list[Path], tmp_path: Path) -> None:
    second = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(CorruptCheckpoint, match=r"00002-of-00003\.gguf is not part 2 of 3: its split\.no"):
        open_checkpoint(str(parts[0]))
    write_gguf(parts[1], make_model("llama", num_hidden_layers=1))  # a whole file under that name
    with pytest.raises(CorruptCheckpoint, match=r"is not part 2 of 3: its split\.no"):
        open_checkpoint(str(parts[0]))
    parts[1].write_bytes(second[: len(second) // 2])
    with pytest.raises(CorruptCheckpoint, match=r"00002-of-00003\.gguf is not a whole GGUF file"):
        open_checkpoint(str(parts[0]))


def test_parts_that_hold_a_tensor_twice_or_too_few(tmp_path: Path) -> None:
    def write(path: Path, number: int, name: str) -> None:
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", 3)
        writer.add_tensor(name, np.ones(4, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write(tmp_path / "m-00001-of-00002.gguf", 0, "a")
    for name, message in (("a", "a is in an earlier part as well"), ("b", "hold 2 tensors instead of 3")):
        write(tmp_path / "m-00002-of-00002.gguf", 1, name)
        with pytest.raises(CorruptCheckpoint, match=message):
            open_checkpoint(str(tmp_path / "m-00001-of-00002.gguf"))


def test_big_endian_is_refused_by_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", make_model("llama"), endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(UnsupportedModel, match=r"m\.gguf is a big-endian GGUF"):
        open_checkpoint(str(tmp_path / "m.gguf"))


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, make_model("llama"), tokenizer=byte_level_fields())
    whole = path.read_bytes()
    cuts = [0, 1, 3, 4, 8, 20, 24, *range(30, len(whole) - 32, len(whole) // 60), len(whole) - 32]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(CorruptCheckpoint):
            open_checkpoint(str(path))


def test_damaged_lengths_end_quickly(tmp_path: Path) -> None:
    """A damaged array length must not keep the reader busy."""
    path = tmp_path / "m.gguf"
    write_gguf(path, make_model("llama"), tokenizer=byte_level_fields())
    whole = bytearray(path.read_bytes())
    at = whole.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    whole[at : at + 8] = (1 << 60).to_bytes(8, "little")
    path.write_bytes(whole)
    with pytest.raises(CorruptCheckpoint, match="ends too early"):
        open_checkpoint(str(path))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"garbage" * 40, b"GGUF\x03\x00\x00\x00" + b"\xff" * 40])
def test_garbage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=r"m\.gguf"):
        open_checkpoint(str(tmp_path / "m.gguf"))
