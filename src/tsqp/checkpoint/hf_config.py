"""``config.json`` to and from a ModelConfig.

A key that is absent takes the default of transformers' own configuration class for the family, as transformers would
give it; the five sizes without which no model is meant have none. Both spellings are read: ``rope_theta`` with
``rope_scaling``, and ``rope_parameters`` of transformers 5.

A window of W lets the query at position i attend to keys j with i − W < j ≤ i, so W positions, itself included: that
is transformers' mask (``kv_idx > q_idx - sliding_window``, and causal) and the meaning of ``ModelConfig.windows``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tsqp.checkpoint.shapes import check_layers
from tsqp.config.model import ARCHITECTURES, Architecture, ModelConfig, RopeConfig
from tsqp.errors import CorruptCheckpoint, UnsupportedModel

CAUSAL_LM_CLASSES: dict[Architecture, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclass(frozen=True)
class _Defaults:
    """What transformers assumes for an absent key. None: derived from other keys."""

    max_positions: int
    num_kv_heads: int | None
    head_dim: int | None
    window: int | None


_DEFAULTS: dict[Architecture, _Defaults] = {
    "llama": _Defaults(max_positions=2048, num_kv_heads=None, head_dim=None, window=None),
    "mistral": _Defaults(max_positions=131_072, num_kv_heads=8, head_dim=None, window=4096),
    "qwen2": _Defaults(max_positions=32_768, num_kv_heads=32, head_dim=None, window=4096),
    "qwen3": _Defaults(max_positions=32_768, num_kv_heads=32, head_dim=128, window=4096),
}
_DEFAULT_MAX_WINDOW_LAYERS = 28  # qwen2 and qwen3


class _Keys:
    """Typed access to a JSON object: every error names the key."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer; required when there is no default. A default also replaces null."""
        value = self._values.get(key)
        if value is None:
            value = default
        if value is None:
            raise CorruptCheckpoint(f"{self._where} has no {key}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CorruptCheckpoint(f"{self._where}: {key} must be a positive integer, not {value!r}")
        return value

    def optional_size(self, key: str, default: int | None) -> int | None:
        """A positive integer or null; the default only replaces an absent key."""
        if key in self._values:
            return None if self._values[key] is None else self.size(key)
        return default

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number; required when there is no default."""
        value = self._values.get(key)
        if value is None:
            value = default
        if value is None:
            raise CorruptCheckpoint(f"{self._where} has no {key}")
        # JSON's integers have no bound, so a float has to be asked for the largest.
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise CorruptCheckpoint(f"{self._where}: {key} must be a positive number, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._values.get(key, default)
        if not isinstance(value, bool):
            raise CorruptCheckpoint(f"{self._where}: {key} must be true or false, not {value!r}")
        return value


def parse_config(given: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The shape that a ``config.json`` describes; ``where`` names it in errors.

    Raises UnsupportedModel for what is not implemented, by name, and CorruptCheckpoint for a missing or invalid key.
    """
    architecture = _architecture(given, where)
    _refuse_what_changes_the_computation(given, where)
    keys, defaults = _Keys(given, where), _DEFAULTS[architecture]
    hidden_size = keys.size("hidden_size")
    num_layers = check_layers(keys.size("num_hidden_layers"), where)
    num_heads = keys.size("num_attention_heads")
    default_kv_heads = num_heads if "num_key_value_heads" in given else defaults.num_kv_heads or num_heads
    num_kv_heads = keys.size("num_key_value_heads", default_kv_heads)
    default_head_dim = hidden_size // num_heads if "head_dim" in given else defaults.head_dim
    head_dim = keys.size("head_dim", default_head_dim or hidden_size // num_heads or None)
    if num_heads % num_kv_heads:
        raise CorruptCheckpoint(f"{where}: {num_heads} attention heads do not divide among {num_kv_heads} KV heads")
    if head_dim % 2:
        raise CorruptCheckpoint(f"{where}: head_dim must be even for rotary embeddings, not {head_dim}")
    max_positions = keys.size("max_position_embeddings", defaults.max_positions)
    qkv_bias, o_bias, mlp_bias = _biases(architecture, keys)
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        intermediate_size=keys.size("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=keys.size("vocab_size"),
        max_positions=max_positions,
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope=_rope(given, max_positions, where),
        windows=_windows(architecture, given, keys, num_layers, where),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=architecture == "qwen3",
        tied_embeddings=keys.flag("tie_word_embeddings"),
    )


def hf_config_of(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """A ``config.json`` that both ``parse_config`` and transformers read back as ``config``."""
    given: dict[str, Any] = {
        "architectures": [CAUSAL_LM_CLASSES[config.architecture]],
        "model_type": config.architecture,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config.rope),
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": dtype,
    }
    if config.architecture in ("llama", "qwen3"):
        given["attention_bias"] = config.o_bias
    if config.architecture == "llama":
        given["mlp_bias"] = config.mlp_bias
    window = next((w for w in config.windows if w is not None), None)
    if config.architecture == "mistral":
        given["sliding_window"] = window
    elif config.architecture != "llama":
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


def _refuse_what_changes_the_computation(given: Mapping[str, Any], where: str) -> None:
    if given.get("quantization_config"):
        quantization = given["quantization_config"]
        method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else "?"
        raise UnsupportedModel(f"{where}: quantization_config ({method}) is not implemented; use the original weights")
    activation = given.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):  # two names of one function
        raise UnsupportedModel(f"{where}: hidden_act {activation!r} is not implemented; only silu is")


def _biases(architecture: Architecture, keys: _Keys) -> tuple[bool, bool, bool]:
    """Whether Q, K and V, the attention output, and the MLP have biases."""
    match architecture:
        case "llama":
            attention = keys.flag("attention_bias")
            return attention, attention, keys.flag("mlp_bias")
        case "mistral":
            return False, False, False
        case "qwen2":  # fixed by the architecture, no key
            return True, False, False
        case "qwen3":
            attention = keys.flag("attention_bias")
            return attention, attention, False


def _rope(given: Mapping[str, Any], max_positions: int, where: str) -> RopeConfig:
    # The order of transformers 5: a rope_scaling that is not empty wins over rope_parameters.
    parameters = given.get("rope_scaling") or given.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise CorruptCheckpoint(f"{where}: the rope parameters must be an object, not {parameters!r}")
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UnsupportedModel(f"{where}: rope_parameters per layer type are not implemented")
    if parameters.get("partial_rotary_factor", given.get("partial_rotary_factor")) not in (None, 1):
        raise UnsupportedModel(f"{where}: a partial_rotary_factor other than 1 is not implemented")
    theta = _Keys({"rope_theta": parameters.get("rope_theta", given.get("rope_theta"))}, where)
    theta_value = theta.number("rope_theta", 10_000.0)
    keys = _Keys(parameters, f"{where} (rope)")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    match kind:
        case "default":
            return RopeConfig(theta_value)
        case "linear":
            return RopeConfig(theta_value, "linear", keys.number("factor"))
        case "llama3":
            low, high = keys.number("low_freq_factor"), keys.number("high_freq_factor")
            if high <= low:
                raise CorruptCheckpoint(f"{where} (rope): high_freq_factor must be above low_freq_factor")
            original = keys.size("original_max_position_embeddings", max_positions)
            return RopeConfig(theta_value, "llama3", keys.number("factor"), low, high, original)
    raise UnsupportedModel(f"{where}: rope type {kind!r} is not implemented; supported are default, linear, llama3")


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    match rope.kind:
        case "default":
            return None
        case "linear":
            return {"rope_type": "linear", "factor": rope.factor}
        case "llama3":
            return {
                "rope_type": "llama3",
                "factor": rope.factor,
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
                "original_max_position_embeddings": rope.original_max_positions,
            }


def _windows(
    architecture: Architecture, given: Mapping[str, Any], keys: _Keys, num_layers: int, where: str
) -> tuple[int | None, ...]:
    """The window of every layer. Llama has none, mistral one for all, qwen2 and qwen3 choose by layer."""
    if architecture == "llama":
        return (None,) * num_layers
    window = keys.optional_size("sliding_window", _DEFAULTS[architecture].window)
    if architecture == "mistral":
        return (window,) * num_layers
    if not keys.flag("use_sliding_window"):
        window = None
    layer_types = given.get("layer_types")
    if layer_types is None:
        # Zero is allowed here: then every layer slides.
        first = given.get("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise CorruptCheckpoint(f"{where}: max_window_layers must be a whole number, not {first!r}")
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise CorruptCheckpoint(f"{where}: layer_types must list one type for each of the {num_layers} layers")
    for kind in layer_types:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModel(f"{where}: layer type {kind!r} is not implemented")
        if kind == "sliding_attention" and window is None:
            raise CorruptCheckpoint(f"{where}: layer_types asks for sliding_attention, but no sliding_window is in use")
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
