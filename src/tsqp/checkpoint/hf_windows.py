"""Which layers of a ``config.json`` have a window, and which no rotary embedding.

A window of W lets the query at position i attend to keys j with i − W < j ≤ i, so W positions, itself included: that
is transformers' mask (``kv_idx > q_idx - sliding_window``, and causal) and the meaning of ``ModelConfig.windows``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tsqp.checkpoint.config_keys import Keys
from tsqp.checkpoint.hf_families import Family
from tsqp.errors import CorruptCheckpoint, UnsupportedModel

_DEFAULT_MAX_WINDOW_LAYERS = 28  # of Qwen


def unrotated_layers(
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


def layer_windows(
    family: Family, given: Mapping[str, Any], keys: Keys, unrotated: tuple[bool, ...], where: str
) -> tuple[int | None, ...]:
    """The window of every layer; see ``Family.windows``."""
    num_layers = len(unrotated)
    if family.windows == "none":
        return (None,) * num_layers
    window = keys.optional_size("sliding_window", family.window)
    if window is None and family.local_theta is not None:
        raise CorruptCheckpoint(f"{where}: sliding_window must be a positive integer, not null")
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
    if family.pattern is not None:
        pattern = Keys(given, where).size("sliding_window_pattern", family.pattern)
        return tuple((layer + 1) % pattern != 0 for layer in range(len(unrotated)))
    if family.windows == "listed":
        return (True,) * len(unrotated)
    first = given.get("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS)  # zero is allowed: then every layer slides
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise CorruptCheckpoint(f"{where}: max_window_layers must be a whole number, not {first!r}")
    return tuple(layer >= first for layer in range(len(unrotated)))
