"""A GGUF file: metadata with types checked, and tensors by their GGUF names."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFEndian, GGUFReader, dequantize

from tsqp.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint, UnsupportedModel

if TYPE_CHECKING:
    import torch

# What the reader raises on bytes that are not a GGUF file; it was written for good ones.
_READER_ERRORS = (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, RecursionError)
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class GgufFile:
    """Tensors stay memory-mapped. Of a split file the first part is named; it has the metadata of all.

    Raises CheckpointNotFound where a part is missing, CorruptCheckpoint, UnsupportedModel if big-endian.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = _read(path)
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        count = self.integer("split.count", 1)
        if count > 1:
            for number, part in enumerate(_other_parts(path, self.integer("split.no"), count), start=1):
                self._add_part(part, number, count)
            stored = self.integer("split.tensors.count", len(self._tensors))
            if stored != len(self._tensors):
                raise CorruptCheckpoint(f"{path}: the parts hold {len(self._tensors)} tensors instead of {stored}")

    def _add_part(self, path: Path, number: int, count: int) -> None:
        reader = _read(path)
        for key, expected in (("split.no", number), ("split.count", count)):
            field = reader.fields.get(key)
            if field is None or field.contents() != expected:
                raise CorruptCheckpoint(f"{path} is not part {number + 1} of {count}: its {key} is not {expected}")
        for tensor in reader.tensors:
            if tensor.name in self._tensors:
                raise CorruptCheckpoint(f"{path}: {tensor.name} is in an earlier part as well")
            self._tensors[tensor.name] = tensor

    def has(self, key: str) -> bool:
        return key in self._fields

    def text(self, key: str, default: str | None = None) -> str:
        return str(self._value(key, str, default))

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self._value(key, int, default))

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._value(key, bool, default))

    def number(self, key: str, default: float | None = None) -> float:
        """A float. The file has 32 bits of it: the shortest decimal that rounds to them is what the author wrote."""
        return float(str(np.float32(self._value(key, (int, float), default))))

    def array(self, key: str, kind: type | tuple[type, ...]) -> list[Any]:
        """A list of values of one kind."""
        values = list(self._value(key, list, None))
        wrong = next((value for value in values if isinstance(value, bool) or not isinstance(value, kind)), None)
        if wrong is not None:
            raise CorruptCheckpoint(f"{self.path}: {key} holds a value of the wrong type ({type(wrong).__name__})")
        return values

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, outermost dimension first."""
        return {name: tuple(reversed(tensor.shape.tolist())) for name, tensor in self._tensors.items()}

    def dtype(self, name: str) -> str:
        """As GGML calls it: F32, BF16, Q4_1, ..."""
        return str(self._tensors[name].tensor_type.name)

    def raw(self, name: str) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """The bytes of a tensor, memory-mapped."""
        return np.asarray(self._tensors[name].data.reshape(-1).view(np.uint8))

    def tensor(self, name: str) -> torch.Tensor:
        """F32, F16 and BF16 as they are, memory-mapped; quantised blocks as float32."""
        import torch

        stored = self._tensors[name]
        if stored.tensor_type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            return torch.from_numpy(np.asarray(stored.data))
        if stored.tensor_type == GGMLQuantizationType.BF16:
            return torch.from_numpy(np.asarray(stored.data)).view(torch.bfloat16)
        try:
            return torch.from_numpy(np.asarray(dequantize(stored.data, stored.tensor_type)))
        except NotImplementedError as error:
            raise UnsupportedModel(
                f"{self.path}: {name} is quantised as {self.dtype(name)}, which is not implemented"
            ) from error

    def _value(self, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        if key not in self._fields:
            if default is None:
                raise CorruptCheckpoint(f"{self.path} has no {key}")
            return default
        try:
            value = self._fields[key].contents()
        except UnicodeDecodeError as error:
            raise CorruptCheckpoint(f"{self.path}: {key} is not UTF-8") from error
        if (isinstance(value, bool) and kind is not bool) or not isinstance(value, kind):
            raise CorruptCheckpoint(f"{self.path}: {key} has a value of the wrong type ({type(value).__name__})")
        if isinstance(value, float) and not math.isfinite(value):
            raise CorruptCheckpoint(f"{self.path}: {key} is not finite")
        return value


def _read(path: Path) -> GGUFReader:
    try:
        # Mode c is a private mapping: torch takes no read-only arrays, and nothing here writes.
        reader = _BoundedReader(path, mode="c")
    except FileNotFoundError as error:
        raise CheckpointNotFound(f"{path} does not exist") from error
    except OSError as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}") from error
    except _READER_ERRORS as error:
        raise CorruptCheckpoint(f"{path} is not a whole GGUF file: {error}") from error
    if reader.endianess is GGUFEndian.BIG:
        raise UnsupportedModel(f"{path} is a big-endian GGUF, which is not implemented; take the little-endian one")
    return reader


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


class _BoundedReader(GGUFReader):
    """Refuses a read past the end, which the base class answers with fewer elements.

    Without it a damaged array length keeps the reader busy for hours.
    """

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("it ends too early")
        return super()._get(offset, dtype, count, override_order)
