"""A checkpoint in a Hugging Face directory: ``config.json`` and safetensors, in one file or in shards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from tsqp.checkpoint.base import Checkpoint, TextFormat
from tsqp.checkpoint.fingerprint import RawTensor, fingerprint
from tsqp.checkpoint.hf_config import parse_config
from tsqp.checkpoint.hf_tensors import stored_shapes, stored_tensors
from tsqp.checkpoint.hf_text import read_text_format
from tsqp.checkpoint.json_object import read_json_object
from tsqp.checkpoint.shapes import EMBEDDING, LM_HEAD, check_stored_shapes
from tsqp.config.model import ModelConfig
from tsqp.errors import CheckpointNotFound, CorruptCheckpoint, UnsupportedModel

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"F32", "F16", "BF16"}


class HuggingFaceCheckpoint(Checkpoint):
    """Weights stay memory-mapped; opening reads the headers only, and holds them against ``config.json``.

    Raises CheckpointNotFound, CorruptCheckpoint or UnsupportedModel when the directory cannot be used.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        config_path = directory / "config.json"
        if not config_path.is_file():
            raise CheckpointNotFound(f"{directory} has no config.json: it is not a Hugging Face model directory")
        config = parse_config(read_json_object(config_path), str(config_path))
        self._files = {path: _open_safetensors(path) for path in _weight_files(directory)}
        self._file_of = {tensor: path for path, file in self._files.items() for tensor in file.keys()}  # noqa: SIM118
        self._places = stored_tensors(config)
        self._check_headers(config)
        if config.tied_embeddings and self._has_its_own_head():
            config = replace(config, tied_embeddings=False)
            self._places = stored_tensors(config)
        super().__init__(config, str(directory))

    def _read(self, name: str) -> torch.Tensor:
        """In the file's dtype, memory-mapped unless its rows have to be moved."""
        place = self._places[name]
        return place.taken_from(self._read_stored(place.name))

    def _read_stored(self, name: str) -> torch.Tensor:
        """A tensor by its name in the file."""
        path = self._file_of[name]
        try:
            tensor: torch.Tensor = self._files[path].get_tensor(name)
        except SafetensorError as error:
            raise CorruptCheckpoint(f"{path}: {name} cannot be read: {error}") from error
        return tensor

    def fingerprint(self) -> str:
        return fingerprint(self.config, (self._raw(name) for name in self.shapes))

    def text_format(self) -> TextFormat:
        return read_text_format(self.directory)

    def _raw(self, name: str) -> RawTensor:
        import torch

        tensor = self.tensor(name)
        data = tensor.reshape(-1).view(torch.uint8).numpy()
        return RawTensor(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data)

    def _has_its_own_head(self) -> bool:
        """Whether a model that calls its head tied stores another one, which then counts: so does transformers."""
        if LM_HEAD not in self._file_of:
            return False
        import torch

        return not torch.equal(self._read_stored(LM_HEAD), self._read_stored(EMBEDDING))

    def _check_headers(self, config: ModelConfig) -> None:
        """Raises CorruptCheckpoint or UnsupportedModel when what is stored is not what the config asks for."""
        shapes = stored_shapes(config, self._places)
        stored: dict[str, tuple[int, ...]] = {}
        for name, path in self._file_of.items():
            header = self._files[path].get_slice(name)
            stored[name] = tuple(header.get_shape())
            if name in shapes and header.get_dtype() not in _DTYPES:
                raise UnsupportedModel(
                    f"{path}: {name} is stored as {header.get_dtype()}; supported are float32, float16 and bfloat16"
                )
        # Older exports store the rotary frequencies, and some store a tied head a second time.
        ignored = {name for name in stored if name.endswith("rotary_emb.inv_freq")}
        if config.tied_embeddings:
            ignored.add(LM_HEAD)
            if stored.get(LM_HEAD, stored.get(EMBEDDING)) != stored.get(EMBEDDING):
                raise CorruptCheckpoint(
                    f"{self.directory}: {LM_HEAD} has shape {stored[LM_HEAD]}, unlike the embedding"
                )
        check_stored_shapes(shapes, stored, ignored, str(self.directory))


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
