"""``config.json`` to and from a ModelConfig.

A key that is absent takes the default of transformers' own configuration class for the family, as transformers would
give it (``hf_families.py``); the five sizes without which no model is meant have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tsqp.checkpoint.config_bounds import check_derived, refusing_arithmetic
from tsqp.checkpoint.config_keys import Keys
from tsqp.checkpoint.hf_families import FAMILIES, TEXT_PARTS, Family
from tsqp.checkpoint.hf_numbers import family_numbers
from tsqp.checkpoint.hf_rope import context_length, parse_ropes, rope_settings
from tsqp.checkpoint.hf_windows import layer_windows, unrotated_layers
from tsqp.checkpoint.shapes import check_layers
from tsqp.config.model import ARCHITECTURES, Architecture, ModelConfig, RopeConfig
from tsqp.errors import CorruptCheckpoint, UnsupportedModel


def parse_config(given: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The shape that a ``config.json`` describes; ``where`` names it in errors.

    Raises UnsupportedModel for what is not implemented, by name, and CorruptCheckpoint for a missing or invalid key.
    """
    with refusing_arithmetic(where):
        return check_derived(_parsed(text_part(given, where), where), where)


def _parsed(given: Mapping[str, Any], where: str) -> ModelConfig:
    architecture = _architecture(given, where)
    family = FAMILIES[architecture]
    _refuse_what_changes_the_computation(given, family, where)
    keys = Keys(given, where)
    hidden_size = keys.size("hidden_size")
    num_layers = check_layers(keys.size("num_hidden_layers"), where)
    num_heads = keys.size("num_attention_heads", family.num_heads)
    default_kv_heads = num_heads if "num_key_value_heads" in given else family.num_kv_heads or num_heads
    num_kv_heads = keys.size("num_key_value_heads", default_kv_heads)
    default_head_dim = hidden_size // num_heads if "head_dim" in given else family.head_dim
    head_dim = keys.size("head_dim", default_head_dim or hidden_size // num_heads or None)
    if num_heads % num_kv_heads:
        raise CorruptCheckpoint(f"{where}: {num_heads} attention heads do not divide among {num_kv_heads} KV heads")
    if head_dim % 2:
        raise CorruptCheckpoint(f"{where}: head_dim must be even for rotary embeddings, not {head_dim}")
    max_positions = keys.size("max_position_embeddings", family.max_positions)
    if family.cohere:  # whose older files say less than the model was made for
        max_positions = max(max_positions, keys.size("model_max_length", 1))
    qkv_bias, o_bias, mlp_bias = _biases(family, keys)
    rope, local_rope = parse_ropes(given, family, head_dim, max_positions, where)
    unrotated = unrotated_layers(family, given, keys, num_layers, where)
    windows = layer_windows(family, given, keys, unrotated, where)
    if family.unrotated_full:
        unrotated = tuple(window is None for window in windows)
    fields: dict[str, Any] = {
        "architecture": architecture,
        "hidden_size": hidden_size,
        "intermediate_size": keys.size("intermediate_size"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "vocab_size": keys.size("vocab_size", family.vocab_size),
        "max_positions": context_length(rope, max_positions),
        "rms_norm_eps": keys.number(family.epsilon_key, family.rms_norm_eps),
        "rope": rope,
        "windows": windows,
        "qkv_bias": qkv_bias,
        "o_bias": o_bias,
        "mlp_bias": mlp_bias,
        "tied_embeddings": keys.flag("tie_word_embeddings", family.tied),
        **family.fixed,
        **ropes_of_layers(rope, local_rope, windows, unrotated),
    }
    return ModelConfig(**fields | family_numbers(family, keys, fields["rms_norm_eps"], hidden_size))


def text_part(given: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The part of a ``config.json`` that is for text: all of it, but for models that take pictures as well."""
    architecture = TEXT_PARTS.get(str(given.get("model_type")))
    if architecture is None:
        return given
    part = given.get("text_config")
    if not isinstance(part, dict) or part.get("model_type", architecture) != architecture:
        raise CorruptCheckpoint(f"{where}: text_config must be an object of model_type {architecture}")
    whole = {key: given[key] for key in ("tie_word_embeddings", "quantization_config") if key in given}
    return {"tie_word_embeddings": True} | part | {"model_type": architecture} | whole


def hf_config_of(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """A ``config.json`` that both ``parse_config`` and transformers read back as ``config``.

    Raises UnsupportedModel for a family whose files have another layout than ours, or keys of their own.
    """
    family = FAMILIES[config.architecture]
    if not family.written:
        raise UnsupportedModel(f"writing a config.json for {config.architecture} is not implemented")
    given: dict[str, Any] = {
        "architectures": [family.causal_lm],
        "model_type": config.architecture,
        "hidden_act": family.activation,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        **rope_settings(config.rope, config.max_positions),
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": dtype,
    }
    if family.biases in ("attention", "mlp"):
        given["attention_bias"] = config.o_bias
    if family.biases == "mlp":
        given["mlp_bias"] = config.mlp_bias
    window = next((w for w in config.windows if w is not None), None)
    if family.windows == "all":
        given["sliding_window"] = window
    elif family.windows == "qwen":
        given["use_sliding_window"] = window is not None
        given["sliding_window"] = window
        given["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in config.windows]
    return given


def _architecture(given: Mapping[str, Any], where: str) -> Architecture:
    model_type = given.get("model_type")
    if not isinstance(model_type, str):
        raise CorruptCheckpoint(f"{where} has no model_type")
    for architecture in ARCHITECTURES:
        if model_type == architecture:
            return architecture
    raise UnsupportedModel(
        f"{where}: model_type {model_type!r} is not implemented; supported are {', '.join(ARCHITECTURES)}"
    )


def _refuse_what_changes_the_computation(given: Mapping[str, Any], family: Family, where: str) -> None:
    for key in family.refused:
        if given.get(key):
            raise UnsupportedModel(f"{where}: {key} is not implemented for this model_type")
    activation = given.get(family.activation_key, family.activation)
    if activation == "swish":  # two names of one function
        activation = "silu"
    if activation != family.activation:
        raise UnsupportedModel(
            f"{where}: {family.activation_key} {activation!r} is not implemented for this model_type; "
            f"only {family.activation} is"
        )


def _biases(family: Family, keys: Keys) -> tuple[bool, bool, bool]:
    """Whether Q, K and V, the attention output, and the MLP have biases."""
    if family.biases == "none":
        return False, False, False
    if family.biases == "qkv":  # fixed by the architecture, no key
        return True, False, False
    attention = keys.flag("attention_bias", family.attention_bias)
    output = keys.flag("attention_out_bias") if family.biases == "apart" else attention
    return attention, output, family.biases != "attention" and keys.flag("mlp_bias")


def ropes_of_layers(
    rope: RopeConfig, local: RopeConfig, windows: tuple[int | None, ...], unrotated: tuple[bool, ...]
) -> dict[str, Any]:
    """The fields for layers that have another rotary embedding than ``rope``: ``local`` those with a window."""
    none = RopeConfig(rope.theta, "none")
    of_layers = [
        none if still else rope if window is None else local for window, still in zip(windows, unrotated, strict=True)
    ]
    ropes = tuple(dict.fromkeys((rope, *of_layers)))
    if len(ropes) == 1:
        return {}
    return {"other_ropes": ropes[1:], "rope_of_layer": tuple(ropes.index(of_layer) for of_layer in of_layers)}
