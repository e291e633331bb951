"""Configurations of valid JSON whose numbers overflow, divide by zero or vanish in what is made of them."""

from __future__ import annotations

from typing import Any

from .makers import SMALL

SIZES = {key: SMALL[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
REQUIRED = {**SIZES, "num_attention_heads": 4}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}

EXTREMES: list[tuple[dict[str, Any], str]] = [
    (
        {"model_type": "phi3", "original_max_position_embeddings": 1, "rope_scaling": LONGROPE},
        "original_max_position_embeddings of longrope must be at least 2, not 1",
    ),
    ({"rope_scaling": {"type": "yarn", "factor": 1e308}}, "factor must be"),
    ({"rope_scaling": {"type": "yarn", "factor": 1e30}}, "context of"),
    ({"max_position_embeddings": 10**400, "rope_scaling": {"type": "yarn", "factor": 2.0}}, "max_position_embeddings"),
    ({"model_type": "granite", "residual_multiplier": 1e-200}, "residual_multiplier must be"),
    ({"model_type": "granite", "residual_multiplier": 1e-20}, "epsilon of norms would be 1"),
    ({"model_type": "granite", "logits_scaling": 1e30, "embedding_multiplier": 1e30, "residual_multiplier": 0.1}, "1e"),
    ({"model_type": "gemma2", "hidden_size": 10**400}, "hidden_size must be"),
]
