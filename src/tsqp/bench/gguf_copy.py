"""A checkpoint as the GGUF file that llama.cpp reads, kept in the cache: the peer gets the weights that we have."""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import numpy as np
from filelock import FileLock
from gguf import GGMLQuantizationType, GGUFWriter
from rich.console import Console

from tsqp.checkpoint import Checkpoint
from tsqp.checkpoint.cache import cache_directory
from tsqp.checkpoint.gguf import gguf_name
from tsqp.checkpoint.gguf_rope import ROPE_FACTORS, llama3_factors
from tsqp.config.dtype import PlainDtype
from tsqp.config.model import ModelConfig
from tsqp.errors import UnsupportedModel
from tsqp.private_path import make_directories

FORMAT = 1  # of what is written here; files of an older one are not used again
MATRICES: dict[PlainDtype, GGMLQuantizationType] = {
    "float32": GGMLQuantizationType.F32,
    "bfloat16": GGMLQuantizationType.BF16,
    "float16": GGMLQuantizationType.F16,
    "int8": GGMLQuantizationType.Q8_0,  # blocks of 32 with a scale each: llama.cpp's own 8 bits
}


def gguf_copy(checkpoint: Checkpoint, dtype: PlainDtype, console: Console) -> Path:
    """The file, written when the cache has it not: matrices in what ``dtype`` says, vectors in float32, as is usual.

    It has no vocabulary, only a name for every id: prompts are ids. Raises UnsupportedModel, OSError.
    """
    directory = cache_directory() / "llama.cpp"
    path = directory / f"{checkpoint.fingerprint()}-{MATRICES[dtype].name}-{FORMAT}.gguf"
    make_directories(directory)
    with FileLock(directory / "lock"):
        if not path.exists():
            console.print(f"writing the weights for llama.cpp, once: {path}", style="dim", soft_wrap=True, markup=False)
            partial = directory / "partial.gguf"  # one name, under the lock: what a killed process left is overwritten
            try:
                write_gguf(checkpoint, MATRICES[dtype], partial)
                partial.replace(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    return path


def write_gguf(checkpoint: Checkpoint, matrices: GGMLQuantizationType, path: Path) -> None:
    """Write the file tensor by tensor: no more than one is in memory. Raises UnsupportedModel, OSError."""
    config = checkpoint.config
    if any(config.windows):
        raise UnsupportedModel("--peer llama.cpp knows no sliding windows for this architecture")
    if config.architecture not in ("llama", "mistral", "qwen2", "qwen3"):
        raise UnsupportedModel(f"--peer llama.cpp is not implemented for {config.architecture}")
    if config.rope.kind not in ("default", "linear", "llama3"):
        raise UnsupportedModel(f"--peer llama.cpp is not implemented for {config.rope.kind} rotary embeddings")
    # GGUF knows Mistral by llama's name; the two differ in their windows only.
    architecture = "llama" if config.architecture == "mistral" else config.architecture
    writer = GGUFWriter(path, architecture)
    try:
        _add_settings(writer, config)
        shapes = dict(checkpoint.shapes)
        if config.rope.kind == "llama3":
            shapes[ROPE_FACTORS] = (config.head_dim // 2,)
        kinds = {name: _kind(shape, matrices) for name, shape in shapes.items()}
        for name, shape in shapes.items():
            stored = gguf.quant_shape_to_byte_shape(shape, kinds[name])
            as_named = name if name == ROPE_FACTORS else gguf_name(name)
            writer.add_tensor_info(as_named, stored, np.dtype(np.uint8), math.prod(stored), kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, kind in kinds.items():
            writer.write_tensor_data(gguf.quantize(_values(checkpoint, name, architecture), kind))
    finally:
        writer.close()


def _add_settings(writer: GGUFWriter, config: ModelConfig) -> None:
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    if config.rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope.factor)
    if config.rope.kind == "llama3":
        writer.add_rope_scaling_orig_ctx_len(config.rope.original_max_positions)
    writer.add_vocab_size(config.vocab_size)
    # llama.cpp's server writes each token as text, so tokens need names. Of the kinds of tokenizers that it knows, this
    # one has no end token: every id is an ordinary one, and no answer ends early.
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list([f"<{token}>" for token in range(config.vocab_size)])


def _kind(shape: tuple[int, ...], matrices: GGMLQuantizationType) -> GGMLQuantizationType:
    """As llama.cpp stores a tensor of this shape: rows that its blocks do not divide stay in 16 bits."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    block_size, _ = gguf.GGML_QUANT_SIZES[matrices]
    return GGMLQuantizationType.F16 if shape[-1] % block_size else matrices


def _values(checkpoint: Checkpoint, name: str, architecture: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    config = checkpoint.config
    if name == ROPE_FACTORS:
        return np.array(llama3_factors(config.rope, config.head_dim), np.float32)
    values: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = checkpoint.tensor(name).float().numpy()
    if architecture == "llama" and "self_attn.q_proj" in name:
        return _to_neighbours(values, config.num_heads)
    if architecture == "llama" and "self_attn.k_proj" in name:
        return _to_neighbours(values, config.num_kv_heads)
    return values


def _to_neighbours(
    rows: np.ndarray[tuple[int, ...], np.dtype[np.float32]], heads: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Rows of Q or K, weights or biases, from the half-rotation order to GGML's for llama: the way back of reading."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
