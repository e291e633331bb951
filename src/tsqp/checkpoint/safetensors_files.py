"""The safetensors files of a directory as one set of tensors: headers are read first, tensors stay memory-mapped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from tsqp.checkpoint.json_object import read_json_object
from tsqp.errors import CheckpointNotFound, CorruptCheckpoint, UnsupportedModel

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class Header(NamedTuple):
    """``dtype`` as safetensors spells it: F32, BF16, F8_E4M3, I32, ..."""

    dtype: str
    shape: tuple[int, ...]


class SafetensorsFiles:
    """Raises CheckpointNotFound, CorruptCheckpoint or UnsupportedModel where a directory has no readable files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = {path: _open_safetensors(path) for path in _weight_files(directory)}
        self._file_of = {name: path for path, file in self._files.items() for name in file.keys()}  # noqa: SIM118
        self.headers = {name: self._header(name) for name in self._file_of}
        self._stored_name = {name: name for name in self._file_of}

    def rename(self, names: Mapping[str, str]) -> None:
        """Give tensors other names from now on: of each the one in the files. Those that have none are left out."""
        self.headers = {name: self.headers[stored] for name, stored in names.items()}
        self._stored_name = dict(names)

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self.headers

    def place(self, name: str) -> str:
        """A tensor and its file, for an error."""
        stored = self._stored_name[name]
        return f"{self._file_of[stored]}: {stored}"

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored, memory-mapped. Raises CorruptCheckpoint."""
        try:
            stored = self._stored_name[name]
            tensor: torch.Tensor = self._files[self._file_of[stored]].get_tensor(stored)
        except SafetensorError as error:
            raise CorruptCheckpoint(f"{self.place(name)} cannot be read: {error}") from error
        return tensor

    def expect(self, name: str, dtypes: Iterable[str], *shapes: tuple[int, ...]) -> None:
        """Hold a tensor's header against what it may be; ``shapes`` are all that are allowed.

        Raises CorruptCheckpoint for a missing tensor or another shape, UnsupportedModel for another dtype.
        """
        if name not in self.headers:
            raise CorruptCheckpoint(f"{self.directory}: the tensor {name} is missing")
        header = self.headers[name]
        if header.dtype not in dtypes:
            raise UnsupportedModel(
                f"{self.place(name)} is stored as {header.dtype}; supported here: {', '.join(dtypes)}"
            )
        if header.shape not in shapes:
            raise CorruptCheckpoint(
                f"{self.place(name)} has shape {header.shape}, its configuration asks for {shapes[0]}"
            )

    def _header(self, name: str) -> Header:
        header = self._files[self._file_of[name]].get_slice(name)
        return Header(header.get_dtype(), tuple(header.get_shape()))


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
