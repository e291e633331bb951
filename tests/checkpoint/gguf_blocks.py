"""Blocks of every form that GGUF has, with random bits: most forms have no quantiser in Python."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import gguf
import numpy as np
import torch

from tsqp.checkpoint.gguf import gguf_name

from .makers import byte_level_fields

Blocks = np.ndarray[tuple[int, int], np.dtype[np.uint8]]

# Where a block has its float16 factors: from these bytes on.
_FACTORS = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "IQ1_S"), (0,)),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)},
}
_OTHERS = ("IQ1_M", "MXFP4", "NVFP4")
FORMS = sorted([*_FACTORS, *_OTHERS])


def random_blocks(form: str, rows: int, width: int, seed: int = 0, *, factor: float = 0.01) -> Blocks:
    """Rows of random blocks, uint8 (rows, bytes), whose float16 factors are of the size of ``factor``."""
    generator = np.random.default_rng(seed)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[form]]
    blocks = generator.integers(0, 256, (rows * width // block, size), dtype=np.uint8)
    factors = (generator.uniform(0.5, 1, len(blocks)) * factor).astype(np.float16).view(np.uint16)
    for at in _FACTORS.get(form, ()):
        blocks[:, at : at + 2] = factors.view(np.uint8).reshape(-1, 2)
    if form == "IQ1_M":  # the factor's nibbles are the upper ones of four numbers
        for index in range(4):
            blocks[:, 49 + 2 * index] = (factors >> 4 * index & 15) << 4 | blocks[:, 49 + 2 * index] & 15
    if form == "MXFP4":  # a power of two
        blocks[:, 0] = 120
    if form == "NVFP4":  # four floats of 8 bits
        blocks[:, :4] = 0x18
    return blocks.reshape(rows, -1)


def numbers(form: str, blocks: Blocks) -> torch.Tensor:
    """What blocks stand for, by the package: float32 (rows, width)."""
    return torch.from_numpy(np.asarray(gguf.dequantize(blocks, gguf.GGMLQuantizationType[form])))


def write_mix(
    path: Path,
    *,
    hidden: int = 256,
    inner: int = 512,
    layers: int = 2,
    heads: tuple[int, int] = (4, 2),
    vocab: int = 320,
    forms: Sequence[str] = (),
) -> None:
    """A llama of random blocks, in forms as Q4_K_M files have them, or in the given ones in turn.

    Norms are float32. The head is the embedding.
    """
    in_turn = cycle(forms)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads[0])
    writer.add_head_count_kv(heads[1])
    writer.add_layer_norm_rms_eps(1e-5)
    kv = hidden // heads[0] * heads[1]
    parts = {
        **{"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden)},
        **{"self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)},
        **{"mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)},
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    shapes |= {f"model.layers.{i}.{part}.weight": shape for i in range(layers) for part, shape in parts.items()}
    for seed, (name, shape) in enumerate(shapes.items()):
        if len(shape) == 1:
            writer.add_tensor(gguf_name(name), np.ones(shape, np.float32))
            continue
        of_mix = "Q6_K" if any(part in name for part in ("v_proj", "down_proj", "embed_tokens")) else "Q4_K"
        kind = next(in_turn, of_mix)
        # K forms multiply the factor by up to 6 bits and again by up to 4 bits, or 6.
        blocks = random_blocks(kind, shape[0], shape[1], seed, factor=1e-4)
        writer.add_tensor(gguf_name(name), blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    fields = byte_level_fields()
    writer.add_tokenizer_model(fields["model"])
    writer.add_tokenizer_pre(fields["pre"])
    writer.add_token_list([*fields["tokens"], *(f"[more{i}]" for i in range(vocab - len(fields["tokens"])))])
    writer.add_token_merges(fields["merges"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
