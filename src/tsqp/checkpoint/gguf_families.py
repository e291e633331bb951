"""The architectures of GGUF that are read: a row of a table each, beside the rows of ``hf_families.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tsqp.config.model import Architecture


@dataclass(frozen=True)
class GgufFamily:
    """What GGUF's layout of a family is, where it is not that of its Hugging Face files.

    ``moved``: rows of Q and K were moved so that neighbours of a head are rotated together. ``names``: of norms that
    have others than Llama's. ``offset_added``: norm weights already have ``ModelConfig.norm_offset``.
    """

    architecture: Architecture
    moved: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    offset_added: bool = False


_NORMS_AFTER = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GGUF_FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily("llama", moved=True),
    "qwen2": GgufFamily("qwen2"),
    "qwen3": GgufFamily("qwen3"),
    "smollm3": GgufFamily("smollm3", moved=True),
    "seed_oss": GgufFamily("seed_oss", names={"post_attention_layernorm": "post_attention_norm"}),
    "arcee": GgufFamily("arcee", moved=True),
    "phi3": GgufFamily("phi3"),
    "granite": GgufFamily("granite", moved=True),
    "olmo2": GgufFamily("olmo2", names=_NORMS_AFTER),
    "gemma2": GgufFamily("gemma2", names=_NORMS_AFTER, offset_added=True),
    "gemma3": GgufFamily("gemma3_text", names=_NORMS_AFTER, offset_added=True),
    "command-r": GgufFamily("cohere"),
    "cohere2": GgufFamily("cohere2"),
}
