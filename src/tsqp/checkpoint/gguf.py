"""A checkpoint in one GGUF file, presented under Hugging Face names and layouts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tsqp.checkpoint.base import Checkpoint, TextFormat
from tsqp.checkpoint.fingerprint import RawTensor, fingerprint
from tsqp.checkpoint.gguf_config import ROPE_TENSORS, config_from_gguf
from tsqp.checkpoint.gguf_file import GgufFile
from tsqp.checkpoint.shapes import EMBEDDING, FINAL_NORM, LM_HEAD, check_stored_shapes

if TYPE_CHECKING:
    import torch

_OUTER_NAMES = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", LM_HEAD: "output.weight"}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class GgufCheckpoint(Checkpoint):
    """Opening reads the metadata and holds the tensors' shapes against it; a tensor is dequantised at every call.

    Raises CheckpointNotFound, CorruptCheckpoint or UnsupportedModel when the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.file = GgufFile(path)
        super().__init__(config_from_gguf(self.file), str(path))
        self._gguf_names = {hf: gguf_name(hf) for hf in self.shapes}
        expected = {self._gguf_names[hf]: shape for hf, shape in self.shapes.items()}
        check_stored_shapes(expected, self.file.shapes(), ROPE_TENSORS, str(path))

    def _read(self, name: str) -> torch.Tensor:
        """One tensor: float32, float16 and bfloat16 as stored, quantised blocks as the float32 they stand for."""
        tensor = self.file.tensor(self._gguf_names[name])
        if self._rows_are_interleaved:
            if "self_attn.q_proj" in name:
                return _to_half_rotation(tensor, self.config.num_heads)
            if "self_attn.k_proj" in name:
                return _to_half_rotation(tensor, self.config.num_kv_heads)
        return tensor

    def fingerprint(self) -> str:
        """Over the bytes of this file, so it differs from that of the same model in another format."""
        file, names = self.file, self._gguf_names
        return fingerprint(
            self.config,
            (RawTensor(hf, file.dtype(name), self.shapes[hf], file.raw(name)) for hf, name in names.items()),
        )

    def text_format(self) -> TextFormat:
        from tsqp.checkpoint.gguf_tokenizer import text_format_from_gguf

        return text_format_from_gguf(self.file)

    @property
    def _rows_are_interleaved(self) -> bool:
        return self.file.text("general.architecture") == "llama"


def gguf_name(name: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` → ``blk.3.ffn_up.weight``."""
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_LAYER_NAMES[part]}.{kind}"


def _to_half_rotation(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of Q or K, weights or biases, from GGML's order for llama to that of transformers.

    GGML rotates neighbours (0, 1), (2, 3), ... of a head, transformers pairs row i with row i + head_dim/2. So of
    each head come first the even rows, then the odd ones.
    """
    pairs = tensor.shape[0] // heads // 2
    by_pair = tensor.reshape(heads, pairs, 2, *tensor.shape[1:])  # (heads, pairs, 2, ...)
    return by_pair.transpose(1, 2).reshape(tensor.shape)
