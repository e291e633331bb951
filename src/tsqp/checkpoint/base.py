"""What a checkpoint offers, whatever its format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
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
    Q and K rows in the half-rotation order of transformers. ``left_out`` names the parts of the file that are for
    something else than text, and are not read.
    """

    left_out: tuple[str, ...] = ()

    def __init__(self, config: ModelConfig, where: str) -> None:
        self.config = config
        self.shapes = tensor_shapes(config)  # of every tensor, by name
        self._where = where

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in the file's dtype or what quantised ones stand for (docs/models.md); possibly memory-mapped.

        A tied LM head is the embedding. Raises CorruptCheckpoint when the model has no such tensor.
        """
        return self._read(self._known(name))

    def row_blocks(self, name: str, first: int = 0, end: int | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """Rows ``first`` to ``end`` of the same tensor, or all, in parts and in order: the first row of each, its rows.

        A part that is made when it is read is small, so that whoever lets go of each part holds no large tensor twice.
        Of other rows nothing is read but those of a head that is divided, and what is packed with the rows asked for.
        """
        name = self._known(name)
        rows = self.shapes[name][0]
        end = rows if end is None else end
        if not 0 <= first <= end <= rows:
            raise ValueError(f"{name} has no rows {first} to {end}: it has {rows}")
        return self._read_blocks(name, first, end) if first < end else iter(())

    def copy(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> torch.Tensor:
        """The same tensor in memory of its own, which nobody else can change; in the dtype of ``tensor`` for None."""
        import torch

        shape, whole = self.shapes[self._known(name)], torch.empty(0)
        for first, rows in self.row_blocks(name):
            if first == 0:
                whole = torch.empty(shape, dtype=dtype or rows.dtype, device=device)
            whole[first : first + len(rows)] = rows
        return whole

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of ``tensor``, without reading it where that is known."""
        return self.tensor(name).dtype

    def _known(self, name: str) -> str:
        """The name under which a tensor is read. Raises CorruptCheckpoint."""
        if name == LM_HEAD and self.config.tied_embeddings:
            name = EMBEDDING
        if name not in self.shapes:
            raise CorruptCheckpoint(f"{self._where}: this model has no tensor {name}")
        return name

    @abstractmethod
    def _read(self, name: str) -> torch.Tensor:
        """A tensor that is in ``shapes``."""

    def _read_blocks(self, name: str, first: int, end: int) -> Iterator[tuple[int, torch.Tensor]]:
        """See ``row_blocks``, of some rows. In one part, unless a format has more to say: right for what is mapped."""
        yield first, self._read(name)[first:end]

    @abstractmethod
    def fingerprint(self) -> str:
        """64 hex digits over the config and over samples of every tensor's bytes.

        Finds the wrong checkpoint by mistake; it is not proof against one who forges it. One file or many shards give
        the same; another file format or dtype gives another.
        """

    def stored_as(self) -> Mapping[str, int]:
        """For a person: the dtypes and quantised forms of the stored tensors, with how many have each."""
        return {}

    def not_used(self) -> tuple[str, ...]:
        """For a person: what of the stored form plays no part here."""
        return ()

    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return ()

    @abstractmethod
    def text_format(self) -> TextFormat:
        """Tokenizer, template and end tokens. Raises UnsupportedModel for a tokenizer kind that is not implemented."""
