"""GGUF metadata to a ModelConfig."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from tsqp.checkpoint.hf_families import FAMILIES
from tsqp.checkpoint.hf_rope import context_length
from tsqp.checkpoint.shapes import check_layers
from tsqp.config.model import Architecture, ModelConfig, RopeConfig
from tsqp.errors import CorruptCheckpoint, UnsupportedModel

if TYPE_CHECKING:
    from tsqp.checkpoint.gguf_file import GgufFile

ROPE_FACTORS = "rope_freqs.weight"
ROPE_SHORT, ROPE_LONG = "rope_factors_short.weight", "rope_factors_long.weight"
ROPE_TENSORS = {ROPE_FACTORS, ROPE_SHORT, ROPE_LONG}
_SCALINGS = ("none", "linear", "yarn", "longrope")
_ARCHITECTURES: dict[str, Architecture] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """The shape that a GGUF file describes.

    Raises UnsupportedModel for what is not implemented, by name, and CorruptCheckpoint for missing metadata.
    """
    name = file.text("general.architecture")
    if name not in _ARCHITECTURES:
        supported = ", ".join(_ARCHITECTURES)
        raise UnsupportedModel(f"{file.path}: architecture {name!r} is not implemented; supported are {supported}")
    architecture = _ARCHITECTURES[name]
    if file.integer(f"{name}.expert_count", 0) > 0:
        raise UnsupportedModel(f"{file.path}: a mixture of experts ({name}.expert_count) is not implemented")
    shapes = file.shapes()
    hidden_size = _positive(file, f"{name}.embedding_length")
    num_layers = check_layers(_positive(file, f"{name}.block_count"), f"{file.path}: {name}.block_count")
    num_heads = _positive(file, f"{name}.attention.head_count")
    num_kv_heads = _positive(file, f"{name}.attention.head_count_kv", num_heads)
    if num_heads % num_kv_heads:
        raise CorruptCheckpoint(f"{file.path}: {num_heads} attention heads do not divide among {num_kv_heads} KV heads")
    head_dim = _head_dim(file, name, hidden_size // num_heads)
    window = file.integer(f"{name}.attention.sliding_window", 0) or None
    if architecture == "llama" and window is not None:
        # A Mistral exported under llama's name. Most such files leave the window out; then, as for llama.cpp, there is
        # none, which differs beyond its length only.
        architecture = "mistral"
    qkv_bias, o_bias, mlp_bias = _biases(file, architecture)
    max_positions = _positive(file, f"{name}.context_length")
    rope = _rope(file, name, head_dim, max_positions)
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        intermediate_size=_positive(file, f"{name}.feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=shapes.get("token_embd.weight", (0,))[0],
        max_positions=context_length(rope, max_positions),
        rms_norm_eps=file.number(f"{name}.attention.layer_norm_rms_epsilon"),
        rope=rope,
        windows=(window,) * num_layers,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=architecture == "qwen3",
        tied_embeddings="output.weight" not in shapes,
    )


def llama3_factors(rope: RopeConfig, head_dim: int) -> list[float]:
    """The divisor of each of the head_dim/2 rotary frequencies under Llama 3.1's scaling, which GGUF stores."""
    factors = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * rope.theta ** (2 * i / head_dim)
        turns = rope.original_max_positions / wavelength
        kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept = min(1.0, max(0.0, kept))
        factors.append(1 / ((1 - kept) / rope.factor + kept))
    return factors


def _positive(file: GgufFile, key: str, default: int | None = None) -> int:
    value = file.integer(key, default)
    if value < 1:
        raise CorruptCheckpoint(f"{file.path}: {key} must be positive, not {value}")
    return value


def _head_dim(file: GgufFile, name: str, default: int) -> int:
    head_dim = _positive(file, f"{name}.attention.key_length", default)
    if file.integer(f"{name}.attention.value_length", head_dim) != head_dim:
        raise UnsupportedModel(f"{file.path}: value heads of another size than the key heads are not implemented")
    if file.integer(f"{name}.rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModel(f"{file.path}: rotary embedding of a part of each head is not implemented")
    if head_dim % 2:
        raise CorruptCheckpoint(f"{file.path}: the head size must be even for rotary embeddings, not {head_dim}")
    return head_dim


def _biases(file: GgufFile, architecture: Architecture) -> tuple[bool, bool, bool]:
    """Whether Q, K and V, the attention output, and the MLP have biases: GGUF has no keys for it, so by the tensors.

    Combinations that the architecture does not have end in tensors missing or too many.
    """
    stored, kind = file.shapes(), FAMILIES[architecture].biases
    if kind in ("none", "qkv"):
        return kind == "qkv", False, False
    output = "blk.0.attn_output.bias" in stored
    qkv = "blk.0.attn_q.bias" in stored if kind == "apart" else output
    return qkv, output, kind != "attention" and "blk.0.ffn_down.bias" in stored


def _rope(file: GgufFile, name: str, head_dim: int, max_positions: int) -> RopeConfig:
    theta = file.number(f"{name}.rope.freq_base", 10_000.0)
    if theta <= 0:
        raise CorruptCheckpoint(f"{file.path}: {name}.rope.freq_base must be positive, not {theta}")
    key, stored = f"{name}.rope.scaling", file.shapes()
    kind = "longrope" if ROPE_LONG in stored else file.text(f"{key}.type", "none")
    if kind not in _SCALINGS:
        raise UnsupportedModel(
            f"{file.path}: rope scaling {kind!r} is not implemented; supported are {', '.join(_SCALINGS)}"
        )
    if ROPE_FACTORS in stored:
        if kind != "none":
            raise UnsupportedModel(f"{file.path}: {kind} rope scaling together with {ROPE_FACTORS} is not implemented")
        return _llama3_rope(file, name, theta, head_dim)
    if kind == "none":
        return RopeConfig(theta)
    original = _positive(file, f"{key}.original_context_length", max_positions)
    factor = file.number(f"{key}.factor", file.number(f"{name}.rope.scale_linear", max_positions / original))
    if factor <= 0:
        raise CorruptCheckpoint(f"{file.path}: {key}.factor must be positive, not {factor}")
    if kind == "linear":
        return RopeConfig(theta, "linear", factor)
    attention = file.number(f"{key}.attn_factor", 1.0)
    if attention <= 0:
        raise CorruptCheckpoint(f"{file.path}: {key}.attn_factor must be positive, not {attention}")
    if kind == "yarn":
        return _yarn_rope(file, key, RopeConfig(theta, "yarn", factor, original_max_positions=original), attention)
    return _longrope(file, RopeConfig(theta, "longrope", factor, original_max_positions=original), attention, head_dim)


def _yarn_rope(file: GgufFile, key: str, rope: RopeConfig, attention: float) -> RopeConfig:
    """What llama.cpp makes of the keys: ``attn_factor`` is beside YaRN's own attention factor."""
    if rope.theta == 1.0 or rope.factor < 1:
        raise CorruptCheckpoint(f"{file.path}: yarn is not defined for a base of 1 or a factor below 1")
    if file.has(f"{key}.yarn_ext_factor") and file.number(f"{key}.yarn_ext_factor") not in (1.0, -1.0):
        raise UnsupportedModel(f"{file.path}: a yarn_ext_factor other than 1 is not implemented")
    if file.has(f"{key}.yarn_log_multiplier"):
        raise UnsupportedModel(f"{file.path}: {key}.yarn_log_multiplier is not implemented")
    fast, slow = file.number(f"{key}.yarn_beta_fast", 32.0), file.number(f"{key}.yarn_beta_slow", 1.0)
    if fast <= 0 or slow <= 0:
        raise CorruptCheckpoint(f"{file.path}: yarn_beta_fast and yarn_beta_slow must be positive")
    attention *= file.number(f"{key}.yarn_attn_factor", 1.0) * (0.1 * math.log(rope.factor) + 1)
    return replace(rope, beta_fast=fast, beta_slow=slow, attention_factor=attention)


def _longrope(file: GgufFile, rope: RopeConfig, attention: float, head_dim: int) -> RopeConfig:
    """The divisors of each frequency, which GGUF holds as two tensors. ``attn_factor`` is all of the attention factor.

    llama.cpp takes the divisors by the context that it was started with; here it is the text that counts, as the
    authors and transformers have it.
    """
    factors = []
    for name in (ROPE_SHORT, ROPE_LONG):
        if file.shapes().get(name) != (head_dim // 2,):
            raise CorruptCheckpoint(f"{file.path}: longrope needs {name} with {head_dim // 2} numbers")
        factors.append(tuple(float(str(value)) for value in file.tensor(name).float().numpy()))
        if not all(0 < value < math.inf for value in factors[-1]):
            raise CorruptCheckpoint(f"{file.path}: the factors in {name} must be positive numbers")
    return replace(rope, attention_factor=attention, short_factors=factors[0], long_factors=factors[1])


def _llama3_rope(file: GgufFile, name: str, theta: float, head_dim: int) -> RopeConfig:
    """Llama 3.1's scaling, which GGUF holds as its result: one divisor for each frequency.

    The parameters are taken to be Meta's (low 1, high 4, 8,192 positions) with the largest divisor as the factor, and
    then have to give every stored divisor again. Other divisors are refused: their rule is unknown.
    """
    stored = file.tensor(ROPE_FACTORS).flatten().tolist()
    if not all(0 < value < math.inf for value in stored):
        raise CorruptCheckpoint(f"{file.path}: the factors in {ROPE_FACTORS} must be positive numbers")
    if all(value == 1.0 for value in stored):
        return RopeConfig(theta)
    original = file.integer(f"{name}.rope.scaling.original_context_length", 8192)
    rope = RopeConfig(theta, "llama3", round(max(stored), 4), original_max_positions=original)
    derived = llama3_factors(rope, head_dim)
    same = len(derived) == len(stored) and all(
        math.isclose(a, b, rel_tol=1e-4) for a, b in zip(derived, stored, strict=True)
    )
    if not same:
        raise UnsupportedModel(f"{file.path}: the factors in {ROPE_FACTORS} are not those of Llama 3.1's scaling")
    return rope
