"""GGUF metadata to a ModelConfig."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tsqp.checkpoint.shapes import check_layers
from tsqp.config.model import Architecture, ModelConfig, RopeConfig
from tsqp.errors import CorruptCheckpoint, UnsupportedModel

if TYPE_CHECKING:
    from tsqp.checkpoint.gguf_file import GgufFile

ROPE_FACTORS = "rope_freqs.weight"
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
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        intermediate_size=_positive(file, f"{name}.feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=shapes.get("token_embd.weight", (0,))[0],
        max_positions=_positive(file, f"{name}.context_length"),
        rms_norm_eps=file.number(f"{name}.attention.layer_norm_rms_epsilon"),
        rope=_rope(file, name, head_dim),
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
    stored = file.shapes()
    attention = "blk.0.attn_output.bias" in stored
    match architecture:
        case "llama":
            return attention, attention, "blk.0.ffn_down.bias" in stored
        case "mistral":
            return False, False, False
        case "qwen2":
            return True, False, False
        case "qwen3":
            return attention, attention, False


def _rope(file: GgufFile, name: str, head_dim: int) -> RopeConfig:
    theta = file.number(f"{name}.rope.freq_base", 10_000.0)
    if theta <= 0:
        raise CorruptCheckpoint(f"{file.path}: {name}.rope.freq_base must be positive, not {theta}")
    kind = file.text(f"{name}.rope.scaling.type", "none")
    factor = file.number(f"{name}.rope.scaling.factor", file.number(f"{name}.rope.scale_linear", 1.0))
    if kind not in ("none", "linear"):
        raise UnsupportedModel(f"{file.path}: rope scaling {kind!r} is not implemented; supported are none, linear")
    if ROPE_FACTORS in file.shapes():
        if kind == "linear":
            raise UnsupportedModel(f"{file.path}: linear rope scaling together with {ROPE_FACTORS} is not implemented")
        return _llama3_rope(file, name, theta, head_dim)
    if kind == "linear" and factor <= 0:
        raise CorruptCheckpoint(f"{file.path}: {name}.rope.scaling.factor must be positive, not {factor}")
    return RopeConfig(theta, "linear", factor) if kind == "linear" else RopeConfig(theta)


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
