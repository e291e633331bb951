"""Multipliers and soft caps of a ``config.json``, as fields of a ModelConfig."""

from __future__ import annotations

from typing import Any

from tsqp.checkpoint.config_keys import Keys
from tsqp.checkpoint.hf_families import Family


def family_numbers(family: Family, keys: Keys, epsilon: float, hidden_size: int) -> dict[str, Any]:
    """What a family has beside Llama. Raises CorruptCheckpoint."""
    if family.multipliers:
        numbers = granite_numbers(
            epsilon,
            residual=keys.number("residual_multiplier", 1.0),
            embedding=keys.number("embedding_multiplier", 1.0),
            logits=keys.number("logits_scaling", 1.0),
        )
        return numbers | {"score_scale": keys.number("attention_multiplier", 1.0)}
    if family.gemma:
        return _gemma(family, keys, hidden_size)
    if family.cohere:
        normed = keys.flag("use_qk_norm")
        return {"logits_multiplier": keys.number("logit_scale", 0.0625), "qk_norm": normed, "qk_norm_apart": normed}
    return {}


def granite_numbers(epsilon: float, *, residual: float, embedding: float, logits: float) -> dict[str, float]:
    """Granite's. What a layer adds to the hidden states is multiplied there; here they are divided by it instead.

    From the embedding on, hidden states are 1/residual of Granite's, and nothing has to be multiplied. A norm of them
    is the same once epsilon, which is added to their mean square, is divided by its square.
    """
    return {
        "rms_norm_eps": epsilon / residual**2,
        "embedding_multiplier": embedding / residual,
        "logits_multiplier": 1 / logits,
    }


def _gemma(family: Family, keys: Keys, hidden_size: int) -> dict[str, Any]:
    """The multiplier of Gemma's embedding, which is one of the compute dtype, and what becomes of scores and logits."""
    return {
        "embedding_multiplier": hidden_size**0.5,
        "rounded_multiplier": True,
        "score_scale": keys.number("query_pre_attn_scalar", 256) ** -0.5,
        "score_cap": family.score_cap and keys.optional_number("attn_logit_softcapping", family.score_cap),
        "logits_cap": keys.optional_number("final_logit_softcapping", family.logits_cap),
    }
