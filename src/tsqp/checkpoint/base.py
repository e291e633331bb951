"""What a checkpoint offers, whatever its format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tsqp.checkpoint.shapes import EMBEDDING, LM_HEAD, tensor_shapes
from tsqp.config.model import ModelConfig
from tsqp.errors import CorruptCheckpoint

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TextFormat:
    """How text becomes tokens. Read by the trusted side only.

    ``tokenizer_json`` is the text of a Hugging Face ``tokenizer.json``. ``special_tokens`` are those a chat template
    may name (``bos_token``, ``eos_token``, ...). ``eos_token_ids`` end a generation. ``tool_chat_template`` is the one
    for conversations with tools, where the checkpoint has one of its own.
    """

    tokenizer_json: str
    eos_token_ids: tuple[int, ...]
    chat_template: str | None = None
    tool_chat_template: str | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)


class Checkpoint(ABC):
    """Weights by their Hugging Face names, read on demand.

    Names are those of transformers' Llama: ``model.embed_tokens.weight``, ``model.layers.0.self_attn.q_proj.weight``,
    ``model.norm.weight``, ``lm_head.weight`` (absent when tied), whatever the file format; layouts are (out, in), with
    Q and K rows in the half-rotation order of transformers.
    """

    def __init__(self, config: ModelConfig, where: str) -> None:
        self.config = config
        self.shapes = tensor_shapes(config)  # of every tensor, by name
        self._where = where

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in the file's dtype (dequantised to float32 from quantised GGUF blocks), possibly memory-mapped.

        A tied LM head is the embedding. Raises CorruptCheckpoint when the model has no such tensor.
        """
        if name == LM_HEAD and self.config.tied_embeddings:
            name = EMBEDDING
        if name not in self.shapes:
            raise CorruptCheckpoint(f"{self._where}: this model has no tensor {name}")
        return self._read(name)

    @abstractmethod
    def _read(self, name: str) -> torch.Tensor:
        """A tensor that is in ``shapes``."""

    @abstractmethod
    def fingerprint(self) -> str:
        """64 hex digits over the config and over samples of every tensor's bytes.

        Finds the wrong checkpoint by mistake; it is not proof against one who forges it. One file or many shards give
        the same; another file format or dtype gives another.
        """

    @abstractmethod
    def text_format(self) -> TextFormat:
        """Tokenizer, template and end tokens. Raises UnsupportedModel for a tokenizer kind that is not implemented."""
