"""GGUF metadata to a ModelConfig."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tsqp.checkpoint.config_bounds import MAX_SIZE, check_derived, refusing_arithmetic
from tsqp.checkpoint.gguf_families import GGUF_FAMILIES, GgufFamily
from tsqp.checkpoint.gguf_rope import positive_integer, positive_number, read_rope, read_window_rope
from tsqp.checkpoint.hf_config import ropes_of_layers
from tsqp.checkpoint.hf_families import FAMILIES, Family
from tsqp.checkpoint.hf_numbers import granite_numbers
from tsqp.checkpoint.hf_rope import context_length
from tsqp.checkpoint.shapes import check_layers
from tsqp.config.model import Architecture, ModelConfig
from tsqp.errors import CorruptCheckpoint, UnsupportedModel

if TYPE_CHECKING:
    from tsqp.checkpoint.gguf_file import GgufFile

_UNROTATED_STEP = 4  # of SmolLM3: every fourth layer
_LARGE_GEMMAS = {"gemma2": 46, "gemma3": 62}  # layers of the ones whose scores are scaled by another size than a head's


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """The shape that a GGUF file describes.

    Raises UnsupportedModel for what is not implemented, by name, and CorruptCheckpoint for missing metadata.
    """
    with refusing_arithmetic(str(file.path)):
        return check_derived(_read(file), str(file.path))


def _read(file: GgufFile) -> ModelConfig:
    name = file.text("general.architecture")
    row = GGUF_FAMILIES.get(name)
    if row is None:
        supported = ", ".join(GGUF_FAMILIES)
        raise UnsupportedModel(f"{file.path}: architecture {name!r} is not implemented; supported are {supported}")
    if file.integer(f"{name}.expert_count", 0) > 0:
        raise UnsupportedModel(f"{file.path}: a mixture of experts ({name}.expert_count) is not implemented")
    architecture, family = row.architecture, FAMILIES[row.architecture]
    shapes = file.shapes()
    hidden_size = positive_integer(file, f"{name}.embedding_length")
    num_layers = check_layers(positive_integer(file, f"{name}.block_count"), f"{file.path}: {name}.block_count")
    num_heads = positive_integer(file, f"{name}.attention.head_count")
    num_kv_heads = positive_integer(file, f"{name}.attention.head_count_kv", num_heads)
    if num_heads % num_kv_heads:
        raise CorruptCheckpoint(f"{file.path}: {num_heads} attention heads do not divide among {num_kv_heads} KV heads")
    head_dim, rotary_dim = _head_dim(file, name, family, hidden_size // num_heads)
    windows = _windows(file, name, family, num_layers)
    if architecture == "llama" and any(windows):
        # A Mistral exported under llama's name. Most such files leave the window out; then, as for llama.cpp, there is
        # none, which differs beyond its length only.
        architecture = "mistral"
    qkv_bias, o_bias, mlp_bias = _biases(file, architecture)
    max_positions = positive_integer(file, f"{name}.context_length")
    rope = read_rope(file, name, family, head_dim, rotary_dim, max_positions)
    local_rope = read_window_rope(file, name, family, rope)
    unrotated = tuple(
        (family.skips_rope and (layer + 1) % _UNROTATED_STEP == 0) or (family.unrotated_full and window is None)
        for layer, window in enumerate(windows)
    )
    epsilon = file.number(f"{name}.attention.{'layer_norm' if family.cohere else 'layer_norm_rms'}_epsilon")
    fields: dict[str, Any] = {
        "architecture": architecture,
        "hidden_size": hidden_size,
        "intermediate_size": positive_integer(file, f"{name}.feed_forward_length"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "vocab_size": shapes.get("token_embd.weight", (0,))[0],
        "max_positions": context_length(rope, max_positions),
        "rms_norm_eps": epsilon,
        "rope": rope,
        "windows": windows,
        "qkv_bias": qkv_bias,
        "o_bias": o_bias,
        "mlp_bias": mlp_bias,
        "tied_embeddings": "output.weight" not in shapes,
        **family.fixed,
        **ropes_of_layers(rope, local_rope, windows, unrotated),
    }
    config = ModelConfig(**fields | _numbers(file, name, family, epsilon))
    return _gemma(file, name, row, family, config) if family.gemma else config


def _head_dim(file: GgufFile, name: str, family: Family, default: int) -> tuple[int, int | None]:
    """The size of a head, and how many of its numbers are rotated where it is not all."""
    head_dim = positive_integer(file, f"{name}.attention.key_length", default)
    if file.integer(f"{name}.attention.value_length", head_dim) != head_dim:
        raise UnsupportedModel(f"{file.path}: value heads of another size than the key heads are not implemented")
    turned = positive_integer(file, f"{name}.rope.dimension_count", head_dim)
    if turned != head_dim and not family.partial_rotary:
        raise UnsupportedModel(f"{file.path}: rotary embedding of a part of each head is not implemented")
    if head_dim % 2:
        raise CorruptCheckpoint(f"{file.path}: the head size must be even for rotary embeddings, not {head_dim}")
    if turned % 2 or turned > head_dim:
        raise CorruptCheckpoint(f"{file.path}: {name}.rope.dimension_count must be even and at most {head_dim}")
    return head_dim, None if turned == head_dim else turned


def _windows(file: GgufFile, name: str, family: Family, num_layers: int) -> tuple[int | None, ...]:
    """The window of every layer; which of them have one is for llama.cpp a matter of the architecture."""
    key = f"{name}.attention.sliding_window"
    default = family.window if name == "gemma2" else None  # as llama.cpp has it
    window = file.integer(key, default or 0) or None
    if window is not None and not 1 <= window <= MAX_SIZE:
        raise CorruptCheckpoint(f"{file.path}: {key} must be from 1 to {MAX_SIZE}, not {window}")
    if family.pattern is None:
        if window is not None and family.windows in ("none", "listed") and name != "llama":
            raise UnsupportedModel(f"{file.path}: {key} is not implemented for this architecture")
        return (window,) * num_layers
    if file.holds_list(f"{key}_pattern"):
        slides = file.array(f"{key}_pattern", bool)
        if len(slides) != num_layers:
            raise CorruptCheckpoint(f"{file.path}: {key}_pattern must say of each of the {num_layers} layers")
        return tuple(window if slide else None for slide in slides)
    pattern = positive_integer(file, f"{key}_pattern", family.pattern)
    return tuple(window if (layer + 1) % pattern else None for layer in range(num_layers))


def _numbers(file: GgufFile, name: str, family: Family, epsilon: float) -> dict[str, Any]:
    """Granite's and Cohere's multipliers."""
    if family.multipliers:
        if not file.flag(f"{name}.rope.scaling.finetuned", default=True):
            raise UnsupportedModel(f"{file.path}: {name} without rotary embeddings is not implemented")
        key = f"{name}.attention.scale"
        return granite_numbers(
            epsilon,
            residual=positive_number(file, f"{name}.residual_scale", 1.0),
            embedding=positive_number(file, f"{name}.embedding_scale", 1.0),
            logits=positive_number(file, f"{name}.logit_scale", None),
        ) | {"score_scale": positive_number(file, key, 1.0) if file.has(key) else None}
    if family.cohere:
        normed = "blk.0.attn_q_norm.weight" in file.shapes()
        scale = positive_number(file, f"{name}.logit_scale", None)
        return {"logits_multiplier": scale, "qk_norm": normed, "qk_norm_apart": normed}
    return {}


def _gemma(file: GgufFile, name: str, row: GgufFamily, family: Family, config: ModelConfig) -> ModelConfig:
    """With Gemma's numbers. GGUF has no key for the scale of scores: as for llama.cpp, the number of layers tells."""
    large = config.num_layers == _LARGE_GEMMAS[name]
    size = config.hidden_size // config.num_heads if large else config.head_dim
    capped, final = f"{name}.attn_logit_softcapping", f"{name}.final_logit_softcapping"
    if family.score_cap is None and file.has(capped):
        raise UnsupportedModel(f"{file.path}: {capped} is not implemented for this architecture")
    has_final = family.logits_cap is not None or file.has(final)
    return replace(
        config,
        embedding_multiplier=config.hidden_size**0.5,
        rounded_multiplier=True,
        score_scale=size**-0.5,
        score_cap=family.score_cap and positive_number(file, capped, family.score_cap),
        logits_cap=positive_number(file, final, family.logits_cap) if has_final else None,
        norm_offset=0.0 if row.offset_added else config.norm_offset,
    )


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
