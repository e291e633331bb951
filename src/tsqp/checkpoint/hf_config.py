"""``config.json`` to and from a ModelConfig.

A key that is absent takes the default of transformers' own configuration class for the family, as transformers would
give it (``hf_families.py``); the five sizes without which no model is meant have none.

A window of W lets the query at position i attend to keys j with i − W < j ≤ i, so W positions, itself included: that
is transformers' mask (``kv_idx > q_idx - sliding_window``, and causal) and the meaning of ``ModelConfig.windows``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tsqp.checkpoint.config_keys import Keys
from tsqp.checkpoint.hf_families import FAMILIES, Family
from tsqp.checkpoint.hf_rope import context_length, parse_rope, rope_settings
from tsqp.checkpoint.shapes import check_layers
from tsqp.config.model import ARCHITECTURES, Architecture, ModelConfig, RopeConfig
from tsqp.errors import CorruptCheckpoint, UnsupportedModel

_DEFAULT_MAX_WINDOW_LAYERS = 28  # of Qwen


def parse_config(given: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The shape that a ``config.json`` describes; ``where`` names it in errors.

    Raises UnsupportedModel for what is not implemented, by name, and CorruptCheckpoint for a missing or invalid key.
    """
    architecture = _architecture(given, where)
    family = FAMILIES[architecture]
    _refuse_what_changes_the_computation(given, family, where)
    keys = Keys(given, where)
    hidden_size = keys.size("hidden_size")
    num_layers = check_layers(keys.size("num_hidden_layers"), where)
    num_heads = keys.size("num_attention_heads")
    default_kv_heads = num_heads if "num_key_value_heads" in given else family.num_kv_heads or num_heads
    num_kv_heads = keys.size("num_key_value_heads", default_kv_heads)
    default_head_dim = hidden_size // num_heads if "head_dim" in given else family.head_dim
    head_dim = keys.size("head_dim", default_head_dim or hidden_size // num_heads or None)
    if num_heads % num_kv_heads:
        raise CorruptCheckpoint(f"{where}: {num_heads} attention heads do not divide among {num_kv_heads} KV heads")
    if head_dim % 2:
        raise CorruptCheckpoint(f"{where}: head_dim must be even for rotary embeddings, not {head_dim}")
    max_positions = keys.size("max_position_embeddings", family.max_positions)
    qkv_bias, o_bias, mlp_bias = _biases(family, keys)
    rope = parse_rope(given, family, head_dim, max_positions, where)
    unrotated = _unrotated_layers(family, given, keys, num_layers, where)
    fields: dict[str, Any] = {
        "architecture": architecture,
        "hidden_size": hidden_size,
        "intermediate_size": keys.size("intermediate_size"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "vocab_size": keys.size("vocab_size"),
        "max_positions": context_length(rope, max_positions),
        "rms_norm_eps": keys.number("rms_norm_eps", family.rms_norm_eps),
        "rope": rope,
        "windows": _windows(family, given, keys, unrotated, where),
        "qkv_bias": qkv_bias,
        "o_bias": o_bias,
        "mlp_bias": mlp_bias,
        "tied_embeddings": keys.flag("tie_word_embeddings", family.tied),
        **family.fixed,
    }
    if any(unrotated):
        fields |= {"other_ropes": (RopeConfig(rope.theta, "none"),), "rope_of_layer": tuple(map(int, unrotated))}
    if family.multipliers:
        fields |= _multipliers(keys, fields["rms_norm_eps"])
    return ModelConfig(**fields)


def hf_config_of(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """A ``config.json`` that both ``parse_config`` and transformers read back as ``config``.

    For the families that other formats than this one are read of: those of ``gguf_config.py``.
    """
    family = FAMILIES[config.architecture]
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
    if given.get("quantization_config"):
        quantization = given["quantization_config"]
        method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else "?"
        raise UnsupportedModel(f"{where}: quantization_config ({method}) is not implemented; use the original weights")
    activation = given.get("hidden_act", family.activation)
    if activation == "swish":  # two names of one function
        activation = "silu"
    if activation != family.activation:
        raise UnsupportedModel(
            f"{where}: hidden_act {activation!r} is not implemented for this model_type; only {family.activation} is"
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


def _multipliers(keys: Keys, eps: float) -> dict[str, float]:
    """Granite's. What a layer adds to the hidden states is multiplied there; here they are divided by it instead.

    From the embedding on, hidden states are 1/residual_multiplier of Granite's, and nothing has to be multiplied. A
    norm of them is the same once epsilon, which is added to their mean square, is divided by its square.
    """
    residual = keys.number("residual_multiplier", 1.0)
    return {
        "rms_norm_eps": eps / residual**2,
        "embedding_multiplier": keys.number("embedding_multiplier", 1.0) / residual,
        "logits_multiplier": 1 / keys.number("logits_scaling", 1.0),
        "score_scale": keys.number("attention_multiplier", 1.0),
    }


def _unrotated_layers(
    family: Family, given: Mapping[str, Any], keys: Keys, num_layers: int, where: str
) -> tuple[bool, ...]:
    """Which layers have no rotary embedding: those of ``no_rope_layers`` that are 0, as SmolLM3 has them."""
    if not family.skips_rope:
        return (False,) * num_layers
    listed = given.get("no_rope_layers")
    if listed is None:
        interval = keys.size("no_rope_layer_interval", 4)
        return tuple((layer + 1) % interval == 0 for layer in range(num_layers))
    if not isinstance(listed, list) or len(listed) != num_layers or any(rotated not in (0, 1) for rotated in listed):
        raise CorruptCheckpoint(f"{where}: no_rope_layers must list 0 or 1 for each of the {num_layers} layers")
    return tuple(not rotated for rotated in listed)


def _windows(
    family: Family, given: Mapping[str, Any], keys: Keys, unrotated: tuple[bool, ...], where: str
) -> tuple[int | None, ...]:
    """The window of every layer; see ``Family.windows``."""
    num_layers = len(unrotated)
    if family.windows == "none":
        return (None,) * num_layers
    window = keys.optional_size("sliding_window", family.window)
    if family.windows == "all":
        return (window,) * num_layers
    if (family.windows == "qwen" or family.skips_rope) and not keys.flag("use_sliding_window"):
        window = None
    layer_types = given.get("layer_types")
    if layer_types is None:
        sliding = _sliding_by_default(family, given, unrotated, where)
        return tuple(window if slides else None for slides in sliding)
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise CorruptCheckpoint(f"{where}: layer_types must list one type for each of the {num_layers} layers")
    for kind in layer_types:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModel(f"{where}: layer type {kind!r} is not implemented")
        if kind == "sliding_attention" and window is None:
            raise CorruptCheckpoint(f"{where}: layer_types asks for sliding_attention, but no sliding_window is in use")
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def _sliding_by_default(
    family: Family, given: Mapping[str, Any], unrotated: tuple[bool, ...], where: str
) -> tuple[bool, ...]:
    """Which layers have the window where no ``layer_types`` say."""
    if family.skips_rope:
        return unrotated
    if family.windows == "listed":
        return (True,) * len(unrotated)
    first = given.get("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS)  # zero is allowed: then every layer slides
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise CorruptCheckpoint(f"{where}: max_window_layers must be a whole number, not {first!r}")
    return tuple(layer >= first for layer in range(len(unrotated)))
