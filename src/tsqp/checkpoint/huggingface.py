"""A checkpoint in a Hugging Face directory: ``config.json`` and safetensors, in one file or in shards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from tsqp.checkpoint.base import TextFormat
from tsqp.checkpoint.fingerprint import RawTensor, fingerprint
from tsqp.checkpoint.hf_config import spec_from_config
from tsqp.checkpoint.hf_text import read_text_format
from tsqp.checkpoint.json_object import read_json_object
from tsqp.checkpoint.shapes import EMBEDDING, LM_HEAD, check_stored_shapes, tensor_shapes
from tsqp.errors import CheckpointNotFound, CorruptCheckpoint, UnsupportedModel
from tsqp.spec.model import ModelSpec

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"F32", "F16", "BF16"}


class HuggingFaceCheckpoint:
    """Weights stay memory-mapped; opening reads the headers only, and holds them against ``config.json``.

    Raises CheckpointNotFound, CorruptCheckpoint or UnsupportedModel when the directory cannot be used.
    """

    def __init__(self, directory: Path, name: str | None = None) -> None:
        self.directory = directory
        self._name = name if name is not None else str(directory)
        config_path = directory / "config.json"
        if not config_path.is_file():
            raise CheckpointNotFound(f"{directory} has no config.json: it is not a Hugging Face model directory")
        self._spec = spec_from_config(read_json_object(config_path), str(config_path))
        self._files = {path: _open_safetensors(path) for path in _weight_files(directory)}
        self._file_of = {tensor: path for path, file in self._files.items() for tensor in file.keys()}  # noqa: SIM118
        self._shapes = tensor_shapes(self._spec)
        self._check_headers()
        if self._has_its_own_head():
            self._spec = replace(self._spec, tied_embeddings=False)
            self._shapes = tensor_shapes(self._spec)

    @property
    def name(self) -> str:
        return self._name

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in the file's dtype, memory-mapped. A tied LM head is the embedding."""
        if name == LM_HEAD and self._spec.tied_embeddings:
            name = EMBEDDING
        if name not in self._shapes:
            raise CorruptCheckpoint(f"{self.directory}: this model has no tensor {name}")
        path = self._file_of[name]
        try:
            tensor: torch.Tensor = self._files[path].get_tensor(name)
        except SafetensorError as error:
            raise CorruptCheckpoint(f"{path}: {name} cannot be read: {error}") from error
        return tensor

    def fingerprint(self) -> str:
        return fingerprint(self._spec, (self._raw(name) for name in self._shapes))

    def text_format(self) -> TextFormat:
        return read_text_format(self.directory)

    def _raw(self, name: str) -> RawTensor:
        import torch

        tensor = self.tensor(name)
        data = tensor.reshape(-1).view(torch.uint8).numpy()
        return RawTensor(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data)

    def _has_its_own_head(self) -> bool:
        """Whether a model that calls its head tied stores another one, which then counts: so does transformers."""
        if not self._spec.tied_embeddings or LM_HEAD not in self._file_of:
            return False
        import torch

        head = self._files[self._file_of[LM_HEAD]].get_tensor(LM_HEAD)
        return not torch.equal(head, self.tensor(EMBEDDING))

    def _check_headers(self) -> None:
        """Raises CorruptCheckpoint or UnsupportedModel when what is stored is not what the spec asks for."""
        stored: dict[str, tuple[int, ...]] = {}
        for name, path in self._file_of.items():
            header = self._files[path].get_slice(name)
            stored[name] = tuple(header.get_shape())
            if name in self._shapes and header.get_dtype() not in _DTYPES:
                raise UnsupportedModel(
                    f"{path}: {name} is stored as {header.get_dtype()}; supported are float32, float16 and bfloat16"
                )
        # Older exports store the rotary frequencies, and some store a tied head a second time.
        ignored = {name for name in stored if name.endswith("rotary_emb.inv_freq")}
        if self._spec.tied_embeddings:
            ignored.add(LM_HEAD)
            if stored.get(LM_HEAD, stored.get(EMBEDDING)) != stored.get(EMBEDDING):
                raise CorruptCheckpoint(
                    f"{self.directory}: {LM_HEAD} has shape {stored[LM_HEAD]}, unlike the embedding"
                )
        check_stored_shapes(self._shapes, stored, ignored, str(self.directory))


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory, in the order of their names."""
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    if (directory / INDEX_FILE).is_file():
        return _shards(directory)
    if any(directory.glob("*.bin")) or any(directory.glob("*.pth")):
        raise UnsupportedModel(f"{directory} holds pickled weights only, which run code when read; use safetensors")
    raise CheckpointNotFound(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}")


def _shards(directory: Path) -> list[Path]:
    index = directory / INDEX_FILE
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpoint(f"{index} has no weight_map")
    names = set(map(str, weight_map.values()))
    for name in sorted(names):
        # The index comes with the download: it may not point outside the directory.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CorruptCheckpoint(f"{index} names {name!r}, which is not a safetensors file of its directory")
        if not (directory / name).is_file():
            raise CorruptCheckpoint(f"{directory / name} is missing, though {INDEX_FILE} names it")
    return [directory / name for name in sorted(names)]


def _open_safetensors(path: Path) -> Any:  # safe_open is a native class without type hints
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CorruptCheckpoint(f"{path} is truncated or damaged: {error}") from error
    except OSError as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error}") from error
