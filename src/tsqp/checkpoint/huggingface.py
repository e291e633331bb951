"""A checkpoint in a Hugging Face directory: ``config.json`` and safetensors, in one file or in shards."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsqp.checkpoint.base import Checkpoint, TextFormat
from tsqp.checkpoint.fingerprint import RawTensor, fingerprint
from tsqp.checkpoint.hf_config import parse_config
from tsqp.checkpoint.hf_families import TEXT_PARTS
from tsqp.checkpoint.hf_tensors import stored_shapes, stored_tensors, text_tensors
from tsqp.checkpoint.hf_text import read_text_format
from tsqp.checkpoint.json_object import read_json_object
from tsqp.checkpoint.safetensors_files import INDEX_FILE, SINGLE_FILE, SafetensorsFiles
from tsqp.checkpoint.shapes import EMBEDDING, LM_HEAD, check_stored_shapes
from tsqp.config.model import ModelConfig
from tsqp.errors import CheckpointNotFound, CorruptCheckpoint, UnsupportedModel

if TYPE_CHECKING:
    import torch

    from tsqp.checkpoint.stored_forms import QuantisedMatrix, StoredForm
    from tsqp.checkpoint.stored_forms.base import RowReader

__all__ = ["INDEX_FILE", "SINGLE_FILE", "HuggingFaceCheckpoint"]

BLOCK_NUMBERS = 1 << 21  # of quantised rows that are dequantised together
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class HuggingFaceCheckpoint(Checkpoint):
    """Weights stay memory-mapped; opening reads the headers only, and holds them against ``config.json``.

    Matrices that are stored quantised (``stored_forms``) are dequantised each time that they are read.
    Raises CheckpointNotFound, CorruptCheckpoint or UnsupportedModel when the directory cannot be used.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        config_path = directory / "config.json"
        if not config_path.is_file():
            raise CheckpointNotFound(f"{directory} has no config.json: it is not a Hugging Face model directory")
        settings = read_json_object(config_path)
        config = parse_config(settings, str(config_path))
        self._form = _form(directory, settings)
        self._files = SafetensorsFiles(directory)
        if settings["model_type"] in TEXT_PARTS:
            named, self.left_out = text_tensors(self._files.headers)
            self._files.rename(named)
        self._lay_out(config)
        if config.tied_embeddings and self._has_its_own_head():
            config = replace(config, tied_embeddings=False)
            self._lay_out(config)
        super().__init__(config, str(directory))

    def stored_as(self) -> Mapping[str, int]:
        kinds: Counter[str] = Counter()
        for place in {place.name for place in self._places.values()}:
            matrix = self._matrices.get(place)
            kinds[matrix.recipe if matrix else _DTYPES[self._files.headers[place].dtype]] += 1
        return dict(kinds.most_common())

    def not_used(self) -> tuple[str, ...]:
        return () if self._form is None else self._form.notes

    def _read(self, name: str) -> torch.Tensor:
        """As it is stored, memory-mapped unless its rows have to be moved; from a quantised matrix its rows alone."""
        place = self._places[name]
        matrix = self._matrices.get(place.name)
        if matrix is None:
            return place.taken_from(self._files.read(place.name))
        return place.ordered(matrix.rows(place.first or 0, place.end or matrix.shape[0]))

    def _read_blocks(self, name: str, first: int, end: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Also of what is mapped: views, so that whoever converts them makes a small tensor at a time."""
        place = self._places[name]
        matrix = self._matrices.get(place.name)
        if matrix is None:
            whole = self._files.read(place.name)
            rows: RowReader = lambda low, high: whole[low:high]  # noqa: E731
        else:
            rows = matrix.rows
        return place.blocks(first, end, BLOCK_NUMBERS // math.prod(self.shapes[name][1:]), rows)

    def dtype(self, name: str) -> torch.dtype:
        import torch

        place = self._places[self._known(name)].name
        if place in self._matrices:
            return self._matrices[place].dtype
        stored: torch.dtype = getattr(torch, _DTYPES[self._files.headers[place].dtype])
        return stored

    def fingerprint(self) -> str:
        """Over the tensors as they are here, and those of quantised matrices as they are stored, with their recipe."""
        plain = (self._raw(name) for name, place in self._places.items() if place.name not in self._matrices)
        return fingerprint(self.config, (*plain, *self._raw_parts()))

    def files(self) -> tuple[Path, ...]:
        return self._files.paths

    def text_format(self) -> TextFormat:
        return read_text_format(self.directory)

    def _raw(self, name: str) -> RawTensor:
        return _raw_tensor(name, self.tensor(name))

    def _raw_parts(self) -> Iterator[RawTensor]:
        for matrix in self._matrices.values():
            for part in matrix.parts:
                yield _raw_tensor(part, self._files.read(part), f"{matrix.recipe}: ")

    def _has_its_own_head(self) -> bool:
        """Whether a model that calls its head tied stores another one, which then counts: so does transformers."""
        if LM_HEAD not in self._files:
            return bool(self._head_parts)
        if self._head_parts or EMBEDDING in self._matrices:
            return True
        import torch

        return not torch.equal(self._files.read(LM_HEAD), self._files.read(EMBEDDING))

    def _lay_out(self, config: ModelConfig) -> None:
        """Find each tensor of a model of this shape, and hold what is stored against it.

        Raises CorruptCheckpoint or UnsupportedModel when what is stored is not what the config asks for.
        """
        self._places = stored_tensors(config)
        shapes = stored_shapes(config, self._places)
        self._matrices = self._quantised(shapes)
        self._head_parts = set()
        if config.tied_embeddings:
            head = self._quantised({LM_HEAD: shapes[EMBEDDING]})
            self._head_parts = {part for matrix in head.values() for part in matrix.parts}
        self._check_headers(config, {name: shape for name, shape in shapes.items() if name not in self._matrices})
        if self._form is not None and self._form.has_matrices and not self._matrices:
            raise UnsupportedModel(
                f"{self.directory} names a quantization_config, but stores no matrix so: quantising on the way, when a "
                "model is loaded, is not implemented"
            )

    def _quantised(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, QuantisedMatrix]:
        """Those of these matrices that are stored quantised."""
        found: dict[str, QuantisedMatrix] = {}
        if self._form is not None:
            for name, shape in shapes.items():
                if len(shape) == 2:
                    matrix = self._form.matrix(self._files, name.removesuffix(".weight"), (shape[0], shape[1]))
                    if matrix is not None:
                        found[name] = matrix
        return found

    def _check_headers(self, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises CorruptCheckpoint or UnsupportedModel for tensors that are stored as they are, and do not fit."""
        headers = self._files.headers
        for name in shapes:
            if name in headers and headers[name].dtype not in _DTYPES:
                raise UnsupportedModel(
                    f"{self._files.place(name)} is stored as {headers[name].dtype}; "
                    "supported are float32, float16 and bfloat16"
                )
        parts = {part for matrix in self._matrices.values() for part in matrix.parts} | self._head_parts
        stored = {name: header.shape for name, header in headers.items() if name not in parts}
        # Older exports store the rotary frequencies, and some store a tied head a second time.
        ignored = {name for name in stored if name.endswith("rotary_emb.inv_freq")}
        if self._form is not None:
            ignored |= self._form.unused_tensors(self._files, self._matrices)
        if config.tied_embeddings:
            ignored.add(LM_HEAD)
            embedding = self._matrices[EMBEDDING].shape if EMBEDDING in self._matrices else stored.get(EMBEDDING)
            if stored.get(LM_HEAD, embedding) != embedding:
                raise CorruptCheckpoint(
                    f"{self.directory}: {LM_HEAD} has shape {stored[LM_HEAD]}, unlike the embedding"
                )
        check_stored_shapes(shapes, stored, ignored, str(self.directory))


def _form(directory: Path, settings: Mapping[str, Any]) -> StoredForm | None:
    from tsqp.checkpoint.stored_forms import form_in

    return form_in(directory, settings)


def _raw_tensor(name: str, tensor: torch.Tensor, recipe: str = "") -> RawTensor:
    import torch

    data = tensor.reshape(-1).view(torch.uint8).numpy()
    return RawTensor(name, recipe + str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data)
