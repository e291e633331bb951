"""A GGUF file: metadata with types checked, and tensors by their GGUF names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tsqp.checkpoint.config_bounds import in_bounds
from tsqp.checkpoint.gguf_forms import Form, dequantised, form_name, form_of
from tsqp.checkpoint.gguf_header import Bytes, GgufHeader, TensorPlace
from tsqp.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint, UnsupportedModel

if TYPE_CHECKING:
    import torch

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class StoredTensor(NamedTuple):
    """A tensor's shape, its outermost dimension first, its form, and its bytes, memory-mapped."""

    shape: tuple[int, ...]
    form: Form
    data: Bytes


class GgufFile:
    """Tensors stay memory-mapped. Of a split file the first part is named; it has the metadata of all.

    Raises CheckpointNotFound where a part is missing, CorruptCheckpoint, and UnsupportedModel for a big-endian file or
    a tensor in a form that is not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.paths = [path]  # of all parts
        self._header = header = GgufHeader(path)
        self._tensors = stored_tensors(header)
        count = self.integer("split.count", 1)
        if count > 1:
            for number, part in enumerate(_other_parts(path, self.integer("split.no"), count), start=1):
                self._add_part(part, number, count)
            stored = self.integer("split.tensors.count", len(self._tensors))
            if stored != len(self._tensors):
                raise CorruptCheckpoint(f"{path}: the parts hold {len(self._tensors)} tensors instead of {stored}")

    def _add_part(self, path: Path, number: int, count: int) -> None:
        header = GgufHeader(path)
        for key, expected in (("split.no", number), ("split.count", count)):
            if header.values.get(key) != expected:
                raise CorruptCheckpoint(f"{path} is not part {number + 1} of {count}: its {key} is not {expected}")
        for name, tensor in stored_tensors(header).items():
            if name in self._tensors:
                raise CorruptCheckpoint(f"{path}: {name} is in an earlier part as well")
            self._tensors[name] = tensor
        self.paths.append(path)

    def has(self, key: str) -> bool:
        return key in self._header.values

    def holds_list(self, key: str) -> bool:
        return self.has(key) and isinstance(self._value(key, object, None), list)

    def text(self, key: str, default: str | None = None) -> str:
        return str(self._value(key, str, default))

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self._value(key, int, default))

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._value(key, bool, default))

    def number(self, key: str, default: float | None = None) -> float:
        """A float. The file has 32 bits of it: the shortest decimal that rounds to them is what the author wrote.

        Of 64 bits, 0 and what float32 can be computed with are taken.
        """
        value = self._value(key, (int, float), default)
        if not in_bounds(value):
            raise CorruptCheckpoint(f"{self.path}: {key} is {value}, and a number is 0 or of 1e-30 to 1e30")
        return float(str(np.float32(value)))

    def array(self, key: str, kind: type | tuple[type, ...]) -> list[Any]:
        """A list of values of one kind."""
        values = list(self._value(key, list, None))
        wrong = next((v for v in values if (isinstance(v, bool) and kind is not bool) or not isinstance(v, kind)), None)
        if wrong is not None:
            raise CorruptCheckpoint(f"{self.path}: {key} holds a value of the wrong type ({type(wrong).__name__})")
        return values

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor of all parts, by its GGUF name."""
        return self._tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, outermost dimension first."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """F32, F16 and BF16 as they are, memory-mapped; quantised blocks as float32."""
        shape = self._tensors[name].shape
        return self.rows(name, 0, math.prod(shape[:-1])).reshape(shape)

    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        """Rows ``first`` to ``end`` of a tensor: (rows, length of a row), as ``tensor`` has them. A vector is a row."""
        import torch

        shape, form, data = self._tensors[name]
        rows = data.reshape(math.prod(shape[:-1]), -1)[first:end]
        if form.name == "BF16":
            return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)
        if form.is_float:
            return torch.from_numpy(rows.view(np.float16 if form.name == "F16" else np.float32))
        return torch.from_numpy(dequantised(form, rows))

    def _value(self, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        if key not in self._header.values:
            if default is None:
                raise CorruptCheckpoint(f"{self.path} has no {key}")
            return default
        value = self._header.value(key)
        if (isinstance(value, bool) and kind is not bool) or not isinstance(value, kind):
            raise CorruptCheckpoint(f"{self.path}: {key} has a value of the wrong type ({type(value).__name__})")
        if isinstance(value, float) and not math.isfinite(value):
            raise CorruptCheckpoint(f"{self.path}: {key} is not finite")
        return value


def stored_tensors(header: GgufHeader) -> dict[str, StoredTensor]:
    """The tensors of one file. Raises UnsupportedModel for a form that is not read, CorruptCheckpoint."""
    return {name: _stored(header, place) for name, place in header.tensors.items()}


def _stored(header: GgufHeader, place: TensorPlace) -> StoredTensor:
    form = form_of(place.form)
    if form is None:
        kind = form_name(place.form)
        raise UnsupportedModel(f"{header.path}: {place.name} is stored as {kind}, which is not implemented")
    if place.shape[-1] % form.block:
        width = place.shape[-1]
        raise CorruptCheckpoint(f"{header.path}: {place.name} has rows of {width} numbers: no whole {form.name} blocks")
    end = place.start + form.bytes_of(place.count)
    if end > len(header.data):
        raise CorruptCheckpoint(f"{header.path} is not a whole GGUF file: it ends before {place.name} does")
    return StoredTensor(place.shape, form, header.data[place.start : end])


def _other_parts(first: Path, number: int, count: int) -> list[Path]:
    """The paths of all parts but the first, which lie beside it. ``number`` counts from 0, names count from 1."""
    name = _PART.fullmatch(first.name)
    if name is None or (int(name["number"]), int(name["count"])) != (number + 1, count):
        expected = f"-{number + 1:05}-of-{count:05}.gguf"
        raise CorruptCheckpoint(f"{first} is part {number + 1} of {count}, but its name does not end in {expected}")
    parts = [first.with_name(f"{name['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    if number != 0:
        raise CheckpointError(f"{first} is part {number + 1} of {count}; name the first, {parts[0]}")
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointNotFound(
            f"{first} is the first of {count} parts, of which {missing[0]}{others} are not beside it"
        )
    return parts[1:]
