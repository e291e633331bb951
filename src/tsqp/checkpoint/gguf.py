"""A checkpoint in one GGUF file, presented under Hugging Face names and layouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tsqp.checkpoint.base import Checkpoint, TextFormat
from tsqp.checkpoint.fingerprint import RawTensor, fingerprint
from tsqp.checkpoint.gguf_config import config_from_gguf
from tsqp.checkpoint.gguf_families import GGUF_FAMILIES
from tsqp.checkpoint.gguf_file import GgufFile
from tsqp.checkpoint.gguf_forms import Form
from tsqp.checkpoint.gguf_rope import ROPE_TENSORS
from tsqp.checkpoint.hf_tensors import stored_shapes, stored_tensors
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
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


BLOCK_NUMBERS = 1 << 21  # of quantised rows that are dequantised together: 8 MB as float32


class GgufCheckpoint(Checkpoint):
    """Opening reads the metadata and holds the tensors' shapes against it; a tensor is dequantised at every call.

    Raises CheckpointNotFound, CorruptCheckpoint or UnsupportedModel when the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.file = GgufFile(path)
        super().__init__(config_from_gguf(self.file), str(path))
        family = GGUF_FAMILIES[self.file.text("general.architecture")]
        self._places = stored_tensors(self.config, moved=family.moved)
        shapes = stored_shapes(self.config, self._places)
        self._gguf_names = {hf: gguf_name(hf, family.names) for hf in shapes}
        expected = {self._gguf_names[hf]: shape for hf, shape in shapes.items()}
        check_stored_shapes(expected, self.file.shapes(), ROPE_TENSORS, str(path))

    def _read(self, name: str) -> torch.Tensor:
        """One tensor: float32, float16 and bfloat16 as stored, quantised blocks as the float32 they stand for."""
        place = self._places[name]
        return place.taken_from(self.file.tensor(self._gguf_names[place.name]))

    def _read_blocks(self, name: str, first: int, end: int) -> Iterator[tuple[int, torch.Tensor]]:
        shape, place = self.shapes[name], self._places[name]
        if len(shape) == 1:  # a row of the file
            return super()._read_blocks(name, first, end)
        rows = partial(self.file.rows, self._gguf_names[place.name])
        return place.blocks(first, end, BLOCK_NUMBERS // shape[1], rows)

    def dtype(self, name: str) -> torch.dtype:
        import torch

        return {"F16": torch.float16, "BF16": torch.bfloat16}.get(self._form(self._known(name)).name, torch.float32)

    def stored_as(self) -> Mapping[str, int]:
        return dict(Counter(self.file.tensors[name].form.name for name in self._gguf_names.values()).most_common())

    def files(self) -> tuple[Path, ...]:
        return tuple(self.file.paths)

    def fingerprint(self) -> str:
        """Over the bytes of this file, so it differs from that of the same model in another format."""
        file, names = self.file, self._gguf_names
        shapes = stored_shapes(self.config, self._places)
        return fingerprint(
            self.config,
            (
                RawTensor(hf, file.tensors[name].form.name, shapes[hf], file.tensors[name].data)
                for hf, name in names.items()
            ),
        )

    def text_format(self) -> TextFormat:
        from tsqp.checkpoint.gguf_tokenizer import text_format_from_gguf

        return text_format_from_gguf(self.file)

    def _form(self, name: str) -> Form:
        return self.file.tensors[self._gguf_names[self._places[name].name]].form


def gguf_name(name: str, names: Mapping[str, str] = _LAYER_NAMES) -> str:
    """``model.layers.3.mlp.up_proj.weight`` → ``blk.3.ffn_up.weight``; ``names`` come before Llama's."""
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{(_LAYER_NAMES | dict(names))[part]}.{kind}"
