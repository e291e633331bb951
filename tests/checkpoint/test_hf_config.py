from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.masking_utils import sliding_window_causal_mask_function
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tsqp.checkpoint.hf_config import hf_config_of, parse_config
from tsqp.config.model import RopeConfig
from tsqp.errors import CorruptCheckpoint, UnsupportedModel

from .extremes import EXTREMES, REQUIRED, SIZES

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

VARIANTS: list[dict[str, Any]] = [
    {"model_type": "llama"},
    {"model_type": "llama", "num_key_value_heads": None, "head_dim": None},
    {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 16, "tie_word_embeddings": True},
    {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": LLAMA3},
    {"model_type": "llama", "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    {"model_type": "llama", "rope_theta": 12345.0, "rope_scaling": {"type": "linear", "factor": 2}},
    {"model_type": "llama", "rope_scaling": {k: v for k, v in LLAMA3.items() if not k.startswith("original")}},
    {"model_type": "mistral", "num_attention_heads": 8},
    {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 2, "head_dim": 16},
    {"model_type": "mistral", "sliding_window": 7, "num_key_value_heads": 4},
    {"model_type": "qwen2", "num_key_value_heads": 2},
    {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 1},
    {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 9},
    {"model_type": "qwen3", "num_key_value_heads": 2, "attention_bias": True},
    {
        "model_type": "qwen3",
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    {"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    {
        "model_type": "qwen3",
        "num_key_value_heads": 2,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 100,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "truncate": False,
            "mscale": 0.8,
            "mscale_all_dim": 0.5,
        },
    },
    {"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 0.5, "attention_factor": 0.7}},
    {"model_type": "qwen2", "num_key_value_heads": 2, "rope_scaling": {"type": "dynamic", "factor": 3.0}},
    {
        "model_type": "llama",
        "max_position_embeddings": 512,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.5, 2.0, 2.5],
            "long_factor": [2.0, 3, 4.0, 5.0],
            "original_max_position_embeddings": 64,
        },
    },
    {"model_type": "arcee"},
    {"model_type": "arcee", "mlp_bias": True, "attention_bias": True, "num_key_value_heads": 2},
    {"model_type": "olmo2"},
]
# Those that only this format is read of: how they are written is not this package's.
OTHERS: list[dict[str, Any]] = [
    {"model_type": "ministral", "num_attention_heads": 8},
    {
        "model_type": "ministral",
        "num_attention_heads": 8,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    {"model_type": "ministral", "num_attention_heads": 8, "sliding_window": None},
    {"model_type": "smollm3"},
    {"model_type": "smollm3", "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 6},
    {"model_type": "smollm3", "no_rope_layer_interval": 2, "rope_theta": 5e6},
    {"model_type": "seed_oss", "num_attention_heads": 8},
    {"model_type": "seed_oss", "num_attention_heads": 8, "attention_out_bias": True, "attention_bias": False},
    {"model_type": "helium", "num_key_value_heads": 2},
    {"model_type": "phi3", "sliding_window": 11},
    {
        "model_type": "phi3",
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]},
    },
    {"model_type": "granite"},
    {"model_type": "gemma2"},
    {"model_type": "gemma2", "sliding_window": 7, "layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
    {"model_type": "cohere", "attention_bias": True, "num_key_value_heads": 2},
    {"model_type": "cohere2", "sliding_window": 7, "sliding_window_pattern": 2},
    {"model_type": "cohere2", "layer_norm_eps": 1e-3, "num_key_value_heads": 2},
]


def _transformers_view(given: PreTrainedConfig) -> dict[str, Any]:
    """What transformers makes of it, in the terms of a ModelConfig."""
    family = given.model_type
    layers = given.num_hidden_layers
    window = getattr(given, "sliding_window", None)
    windows = [window] * layers if family in ("mistral", "phi3") else [None] * layers
    if getattr(given, "layer_types", None):
        windows = [window if kind == "sliding_attention" else None for kind in given.layer_types]
    attention_bias = getattr(given, "attention_bias", False)
    return {
        "num_kv_heads": given.num_key_value_heads,
        "head_dim": getattr(given, "head_dim", None) or given.hidden_size // given.num_attention_heads,
        "max_positions": _context(given),
        "rms_norm_eps": getattr(given, "rms_norm_eps", None) or given.layer_norm_eps,
        "windows": tuple(windows),
        "qkv_bias": family == "qwen2" or attention_bias,
        "o_bias": getattr(given, "attention_out_bias", attention_bias),
        "mlp_bias": getattr(given, "mlp_bias", False),
        "tied_embeddings": given.tie_word_embeddings,
    }


def _context(given: PreTrainedConfig) -> int:
    rope = given.rope_parameters
    if rope["rope_type"] == "dynamic":
        return int(rope["factor"] * given.max_position_embeddings)
    if rope["rope_type"] == "yarn":
        return max(given.max_position_embeddings, int(rope["factor"] * rope["original_max_position_embeddings"]))
    return given.max_position_embeddings


def _rope_view(given: PreTrainedConfig) -> RopeConfig:
    rope = given.rope_parameters
    original = rope.get("original_max_position_embeddings")
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        return RopeConfig(rope["rope_theta"], "llama3", rope["factor"], low, high, original)
    if rope["rope_type"] in ("yarn", "longrope"):
        _, attention = ROPE_INIT_FUNCTIONS[rope["rope_type"]](given, torch.device("cpu"))
        size = getattr(given, "head_dim", None) or given.hidden_size // given.num_attention_heads
        part = int(size * (rope.get("partial_rotary_factor") or 1))
        return RopeConfig(
            rope["rope_theta"],
            rope["rope_type"],
            rope.get("factor") or given.max_position_embeddings / original,
            original_max_positions=original,
            beta_fast=rope.get("beta_fast", 32.0),
            beta_slow=rope.get("beta_slow", 1.0),
            truncate=rope.get("truncate", True),
            attention_factor=attention,
            rotary_dim=part if part < size else None,
            short_factors=tuple(rope.get("short_factor", ())),
            long_factors=tuple(rope.get("long_factor", ())),
        )
    if rope["rope_type"] == "dynamic":
        original = given.max_position_embeddings
        return RopeConfig(rope["rope_theta"], "dynamic", rope["factor"], original_max_positions=original)
    return RopeConfig(rope["rope_theta"], rope["rope_type"], rope.get("factor", 1.0))


@pytest.mark.parametrize("variant", VARIANTS + OTHERS, ids=str)
def test_reads_what_transformers_reads(variant: dict[str, Any]) -> None:
    given = {**REQUIRED, **variant}
    config = parse_config(given)
    theirs = AutoConfig.for_model(**{**given, "rope_scaling": dict(given.get("rope_scaling") or {}) or None})
    assert {key: getattr(config, key) for key in _transformers_view(theirs)} == _transformers_view(theirs)
    assert config.rope == _rope_view(theirs)
    # transformers' own spelling, and ours
    assert parse_config(theirs.to_dict()) == config
    if variant in VARIANTS:
        assert parse_config(hf_config_of(config, "float32")) == config


def test_granite_is_a_llama_with_other_numbers() -> None:
    """Hidden states are divided by what Granite multiplies each layer's contribution by."""
    numbers = {
        "embedding_multiplier": 12,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.125,
        "logits_scaling": 8,
    }
    config = parse_config({"model_type": "granite", **REQUIRED, **numbers, "rms_norm_eps": 1e-5})
    assert (config.embedding_multiplier, config.logits_multiplier) == (24.0, 0.125)
    assert (config.attention_scale, config.rms_norm_eps) == (0.125, 4e-5)


def test_layers_without_rope() -> None:
    config = parse_config({"model_type": "smollm3", **REQUIRED, "no_rope_layers": [1, 0, 1]})
    assert [config.ropes[config.rope_index(layer)].kind for layer in range(3)] == ["default", "none", "default"]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sliding_window": 7, "sliding_window_pattern": 2, "rope_theta": 5e5, "rope_local_base_freq": 2e3},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e6},
        {
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e3},
            },
        },
    ],
    ids=str,
)
def test_layers_of_gemma_3(change: dict[str, Any]) -> None:
    """Those with a window have a rotary embedding of their own, in both spellings."""
    given = {"model_type": "gemma3_text", **REQUIRED, **change}
    config = parse_config(given)
    theirs = AutoConfig.for_model(**copy.deepcopy(given))  # which changes what it is given
    sliding = [kind == "sliding_attention" for kind in theirs.layer_types]
    assert config.windows == tuple(theirs.sliding_window if slides else None for slides in sliding)
    for layer, kind in enumerate(theirs.layer_types):
        rope, of_kind = config.ropes[config.rope_index(layer)], theirs.rope_parameters[kind]
        expected = (of_kind["rope_theta"], of_kind["rope_type"], of_kind.get("factor", 1.0))
        assert (rope.theta, rope.kind, rope.factor) == expected
    assert parse_config(theirs.to_dict()) == config


def test_rope_per_layer_type_for_other_families() -> None:
    ropes = {
        "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    given = {"model_type": "ministral", **REQUIRED, "num_key_value_heads": 4, "layer_types": types}
    config = parse_config({**given, "rope_parameters": ropes})
    assert [config.ropes[config.rope_index(layer)] for layer in range(3)] == [
        RopeConfig(1e4),
        RopeConfig(5e5, "linear", 4.0),
        RopeConfig(1e4),
    ]
    assert parse_config({**given, "rope_parameters": dict.fromkeys(ropes, ropes["full_attention"])}).other_ropes == ()
    with pytest.raises(CorruptCheckpoint, match="sliding_attention"):
        parse_config({**given, "rope_parameters": {"full_attention": ropes["full_attention"]}})


def test_numbers_of_gemma() -> None:
    given = {"model_type": "gemma2", **REQUIRED, "query_pre_attn_scalar": 16}
    config = parse_config(given)
    assert (config.embedding_multiplier, config.attention_scale) == (32**0.5, 0.25)
    assert (config.score_cap, config.logits_cap) == (50.0, 30.0)
    config = parse_config({**given, "attn_logit_softcapping": None, "final_logit_softcapping": 7.5})
    assert (config.score_cap, config.logits_cap) == (None, 7.5)
    assert parse_config({**given, "model_type": "gemma3_text"}).logits_cap is None


def test_the_context_of_older_files_of_cohere() -> None:
    given = {"model_type": "cohere", **REQUIRED, "max_position_embeddings": 8192}
    assert parse_config(given).max_positions == 8192
    assert parse_config({**given, "model_max_length": 131_072}).max_positions == 131_072
    assert parse_config({**given, "model_max_length": 4096}).max_positions == 8192


def test_the_text_part_of_gemma_3() -> None:
    """As published: what is the default is left out."""
    text = {"model_type": "gemma3_text", **SIZES, "sliding_window": 1024}
    del text["vocab_size"]
    given = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 7}}
    config = parse_config(given)
    assert (config.num_heads, config.num_kv_heads, config.vocab_size, config.tied_embeddings) == (8, 4, 262_208, True)
    assert config == parse_config({**text, "tie_word_embeddings": True})
    assert not parse_config({**given, "tie_word_embeddings": False}).tied_embeddings


def test_window_counts_the_position_itself() -> None:
    mask = sliding_window_causal_mask_function(3)
    seen = [j for j in range(8) if mask(0, 0, torch.tensor(5), torch.tensor(j))]
    assert seen == [3, 4, 5]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gemma3n"}, "gemma3n"),
        ({"model_type": "gemma2", "hidden_activation": "gelu"}, "hidden_activation 'gelu'"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"model_type": "cohere2", "use_qk_norm": True}, "use_qk_norm"),
        ({"model_type": "mixtral"}, "mixtral"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"type": "proportional", "factor": 2.0}}, "proportional"),
        ({"model_type": "arcee", "hidden_act": "silu"}, "silu"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        (
            {"model_type": "qwen3", "num_key_value_heads": 2, "layer_types": ["linear_attention"] * 3},
            "linear_attention",
        ),
    ],
)
def test_refuses_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        parse_config({"model_type": "llama", **REQUIRED, **change})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        *[({key: None}, key) for key in REQUIRED],
        ({"model_type": None}, "model_type"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"tie_word_embeddings": 10**400}, "tie_word_embeddings"),
        ({"num_key_value_heads": 3}, "KV heads"),
        ({"head_dim": 5}, "head_dim"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_scaling": "linear"}, "rope"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "dynamic"}}, "factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "factor"),
        ({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_theta": 1, "rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": -1}}, "beta_fast"),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1.0] * 4}}, "short_factor"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 0, 1, 1]}},
            "long_factor",
        ),
        ({"model_type": "phi3", "partial_rotary_factor": 0.4}, "partial_rotary_factor"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 1]}, "no_rope_layers"),
        ({"model_type": "granite", "residual_multiplier": 0}, "residual_multiplier"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"model_type": "gemma2", "attn_logit_softcapping": 0}, "attn_logit_softcapping"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": -1}, "query_pre_attn_scalar"),
        ({"model_type": "gemma3_text", "sliding_window": None}, "sliding_window"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "sliding_window_pattern"),
        ({"model_type": "gemma3_text", "rope_parameters": {"rope_type": "default"}}, "per layer type"),
        ({"model_type": "gemma3"}, "text_config"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3n_text"}}, "text_config"),
        ({"model_type": "cohere", "logit_scale": 0}, "logit_scale"),
        ({"model_type": "cohere", "layer_norm_eps": "small"}, "layer_norm_eps"),
        ({"model_type": "mistral", "num_attention_heads": 8, "sliding_window": -1}, "sliding_window"),
        ({"model_type": "qwen2", "num_key_value_heads": 2, "layer_types": ["full_attention"]}, "layer_types"),
        (
            {"model_type": "qwen2", "num_key_value_heads": 2, "layer_types": ["sliding_attention"] * 3},
            "sliding_window",
        ),
        ({"model_type": "qwen2", "num_key_value_heads": 2, "max_window_layers": "all"}, "max_window_layers"),
        ({"hidden_size": 2**31}, "hidden_size must be"),
        ({"rope_theta": 1e31}, "rope_theta must be"),
        ({"rope_theta": 1e-31}, "rope_theta must be"),
        *EXTREMES,
    ],
    ids=str,
)
def test_names_the_bad_key(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CorruptCheckpoint, match=named) as refused:
        parse_config({"model_type": "llama", **REQUIRED, **change})
    assert len(str(refused.value)) < 250


def test_arithmetic_that_no_bound_foresaw(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("float division by zero")

    monkeypatch.setattr("tsqp.checkpoint.hf_config.parse_ropes", fail)
    with pytest.raises(CorruptCheckpoint, match=r"config\.json: its numbers make no model: float division by zero"):
        parse_config({"model_type": "llama", **REQUIRED})
