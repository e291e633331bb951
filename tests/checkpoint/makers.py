"""Tiny random models, saved by transformers or written as GGUF the way llama.cpp's converter does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 320
MOVED = ("llama", "smollm3", "arcee", "granite")  # architectures whose rows of Q and K the converter moves
TEXTS = [
    "",
    "Hello, world!",
    " leading and trailing ",
    "two  spaces,   three, \t a tab\nand\n\n\nlines\r\n",
    "I'll say it's 3.14159, or 1,234,567 in 2024; can't you?",
    "def f(x: int) -> str:\n    return f'{x!r}'  # ünïcödé",
    "naïve café — “quotes” … № ½ ²",
    "日本語のテキストと한국어, русский, עברית, ไทย",
    "🙂👩‍👩‍👧 emoji \u200d\u0301 combining e\u0301",
    "<tag> </s> <s> [INST] <|im_start|>user\nhi<|im_end|>\n",
    "a" * 70 + " " * 20 + "0" * 20,
    "\x00\x01 control \x7f",
]

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
}


def make_model(family: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model of a family; biases and norms are random as well, so that a swapped one shows."""
    config = AutoConfig.for_model(family, **{**SMALL, **changes})
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def byte_level_tokenizer() -> Tokenizer:
    """A byte-level BPE of VOCAB tokens, the last two of them for chat."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 2, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3 + ["the quick brown fox jumps over the lazy dog " * 5], trainer)
    while tokenizer.get_vocab_size() < VOCAB - 2:
        tokenizer.add_tokens([f"[spare{tokenizer.get_vocab_size()}]"])
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return tokenizer


def byte_level_fields() -> dict[str, Any]:
    """That tokenizer as GGUF metadata."""
    import json

    tokenizer = byte_level_tokenizer()
    vocabulary = sorted(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    model = json.loads(tokenizer.to_str())["model"]
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [token for token, _ in vocabulary],
        "types": [1] * (VOCAB - 2) + [3, 3],
        "merges": [" ".join(merge) for merge in model["merges"]],
        "bos_token_id": VOCAB - 2,
        "eos_token_id": VOCAB - 1,
        "chat_template": "{{ messages[0]['content'] }}",
    }


def write_gguf(
    path: Path,
    model: PreTrainedModel | None = None,
    *,
    arch: str = "llama",
    tokenizer: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
    extra_tensors: dict[str, np.ndarray] | None = None,
    matrix_type: gguf.GGMLQuantizationType | None = None,
    split_tensors: int = 0,
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> None:
    """``metadata`` replaces or adds keys, by their name after the architecture's; None leaves one out.

    With ``split_tensors`` the file is split into parts of so many, named as llama-gguf-split names them.
    """
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split_tensors, endianess=endianess)
    if model is not None:
        config = model.config
        fields: dict[str, Any] = {
            "block_count": config.num_hidden_layers,
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.key_length": getattr(config, "head_dim", None),
        }
        if hasattr(config, "layer_norm_eps"):
            fields["attention.layer_norm_epsilon"] = config.layer_norm_eps
        else:
            fields["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
        ropes = config.rope_parameters
        fields["rope.freq_base"] = ropes.get("full_attention", ropes)["rope_theta"]
        for key, value in {**fields, **(metadata or {})}.items():
            _add(writer, f"{arch}.{key}", value)
        _add_tensors(writer, model, arch, matrix_type)
    for name, array in (extra_tensors or {}).items():
        writer.add_tensor(name, array)
    _add_tokenizer(writer, tokenizer or {})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case None:
            return
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value) if value >= 0 else writer.add_int32(key, value)
        case np.float64():
            writer.add_float64(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)


def _add_tensors(
    writer: gguf.GGUFWriter, model: PreTrainedModel, arch: str, matrix_type: gguf.GGMLQuantizationType | None
) -> None:
    config = model.config
    names = gguf.get_tensor_name_map(
        next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch), config.num_hidden_layers
    )
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None
        array = tensor.float().numpy()
        if arch.startswith("gemma") and "norm" in name:
            array = array + 1
        if arch in MOVED and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            array = _permute(array, heads)
        if tensor.dtype == torch.bfloat16 and array.ndim == 2:
            bits = gguf.quantize(array, gguf.GGMLQuantizationType.BF16)
            writer.add_tensor(gguf_name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
        elif tensor.dtype == torch.float16 and array.ndim == 2:
            writer.add_tensor(gguf_name, array.astype(np.float16))
        elif matrix_type is not None and array.ndim == 2:
            writer.add_tensor(gguf_name, gguf.quantize(array, matrix_type), raw_dtype=matrix_type)
        else:
            writer.add_tensor(gguf_name, array)


def _permute(array: np.ndarray, heads: int) -> np.ndarray:
    """Half-rotation order to neighbours, as the converter does for llama's Q and K."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)


def _add_tokenizer(writer: gguf.GGUFWriter, fields: dict[str, Any]) -> None:
    names = {"types": "token_type"}
    for key, value in fields.items():
        is_template = key.startswith("chat_template")
        name = f"tokenizer.{key}" if is_template else f"tokenizer.ggml.{names.get(key, key)}"
        _add(writer, name, value)
