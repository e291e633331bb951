"""Tiny random models of every supported family, saved by transformers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.session_directory import session_directory

CONTEXT = 256
VOCAB = 320
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.2, 1.4, 1.6, 1.8, 2.0],
    "long_factor": [1.0, 2.0, 3.0, 5.0, 8.0, 12.0],
    "partial_rotary_factor": 0.75,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    ),
    "mistral-window": ("MistralConfig", {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-window": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
}
# What the rest of the suite need not try with everything: parity with transformers, and the bits of private modes.
MORE_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "yarn": ("LlamaConfig", {"rope_parameters": YARN}),
    "dynamic-rope": (
        "LlamaConfig",
        {
            "max_position_embeddings": 40,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 6.0},
        },
    ),
    "ministral": (
        "MinistralConfig",
        {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "seed-oss": ("SeedOssConfig", {"head_dim": 32}),
    "arcee": ("ArceeConfig", {"mlp_bias": True, "rope_parameters": YARN}),
    "helium": ("HeliumConfig", {"head_dim": 16}),
    "phi3": ("Phi3Config", {"sliding_window": 24}),
    "phi3-longrope": ("Phi3Config", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 40}),
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.3,
            "logits_scaling": 8.0,
            "rms_norm_eps": 1e-3,  # large enough to show
        },
    ),
    "olmo2": ("Olmo2Config", {}),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 32,
            "sliding_window": 12,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 0.5,  # of scores and logits that reach it
            "final_logit_softcapping": 0.5,
            "attn_implementation": "eager",  # the only one that knows soft caps
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 32,
            "sliding_window": 12,
            "query_pre_attn_scalar": 20,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 50_000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            },
        },
    ),
    "cohere": ("CohereConfig", {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.5}),
    "cohere2": (
        "Cohere2Config",
        {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"], "layer_norm_eps": 1e-3},
    ),
}


@dataclass(frozen=True)
class TinyModel:
    """A model as transformers holds it, and the directory it was saved to."""

    oracle: Any
    directory: Path

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """transformers' logits, float32 (T, vocab_size)."""
        return _logits(self, tuple(tokens)).clone()

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """transformers' greedy continuation."""
        return list(_greedy(self, tuple(tokens), count))


# Many tests compare with the same answers, and transformers takes longer for one than what is tested.


def _forget_long_texts(model: TinyModel, tokens: tuple[int, ...]) -> None:
    """Dynamic rotary embeddings keep the angles of the longest text until a short one comes."""
    with torch.no_grad():
        model.oracle(torch.tensor([tokens[:1]]))


@cache
def _logits(model: TinyModel, tokens: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        _forget_long_texts(model, tokens)
        return model.oracle(torch.tensor([tokens])).logits[0].float()


@cache
def _greedy(model: TinyModel, tokens: tuple[int, ...], count: int) -> tuple[int, ...]:
    ids = torch.tensor([tokens])
    _forget_long_texts(model, tokens)
    out = model.oracle.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return tuple(out[0, len(tokens) :].tolist())


@cache
def tiny_model(family: str) -> TinyModel:
    """The tiny model of a family; the same one for every test."""
    import transformers

    config_class, options = (FAMILIES | MORE_FAMILIES)[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**SHAPE, **options})
    oracle = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    for parameter in oracle.parameters():  # norms and biases start at 1 and 0, where a wrong one would not show
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    directory = session_directory() / family
    oracle.save_pretrained(directory)
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    return TinyModel(oracle, directory)


def byte_tokenizer() -> Tokenizer:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def random_tokens(count: int, seed: int = 0) -> list[int]:
    """Token ids that every tiny model knows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (count,), generator=generator).tolist()
