"""The header of a GGUF file: its metadata, and where its tensors lie. The bytes may be anybody's.

Every length is held against what is left of the file before anything of that length is read or made. Arrays are not
taken apart here: a worker needs the shape of a model, and none of its 150,000 tokens.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tsqp.errors import CheckpointNotFound, CorruptCheckpoint, UnsupportedModel

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]

_MAGIC = b"GGUF"
_MAP_NORESERVE = 0x4000  # of Linux; Python has no name for it before 3.13
_VERSIONS = (2, 3)
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", _BOOL: "<?"},
    **{10: "<Q", 11: "<q", 12: "<d"},
}
_LENGTH = struct.Struct("<Q")
_MOST_DIMENSIONS = 4  # of GGML
_MOST_NAME = (1 << 16) - 1  # bytes of a key, by the format's description
_MOST_THINGS = 1 << 16  # keys, and tensors: the largest models have some thousands
_LEAST_PAIR = 8 + 4 + 1  # bytes of a key, its type and a value
_LEAST_TENSOR = 8 + 4 + 4 + 8  # bytes of what describes a tensor


@dataclass(frozen=True)
class Array:
    """An array of the metadata, still in the file: ``count`` elements of one type from the byte ``start`` on."""

    kind: int
    count: int
    start: int


@dataclass(frozen=True)
class Text:
    """A text of the metadata, still in the file: from the byte ``start`` to before ``end``."""

    start: int
    end: int


Value = bool | int | float | Text | Array


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies: ``start`` is the first of its bytes in the file, ``form`` GGML's number of how it is stored.

    ``shape``: its outermost dimension first.
    """

    name: str
    shape: tuple[int, ...]
    form: int
    start: int

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


class GgufHeader:
    """``data``: all bytes of the file, memory-mapped. Raises CheckpointNotFound, CorruptCheckpoint, UnsupportedModel.

    Whether the bytes of a tensor are all there is not looked at: that depends on its form.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = _mapped(path)
        self._cursor = cursor = _Cursor(self.data.data, path)
        tensors = self._read_beginning(cursor)
        self.values: dict[str, Value] = dict(self._read_pairs(cursor))
        self.tensors: dict[str, TensorPlace] = {}
        places = [cursor.tensor() for _ in range(cursor.few(tensors, _LEAST_TENSOR, "tensors"))]
        alignment = self._alignment()
        first = -(-cursor.at // alignment) * alignment
        for name, shape, form, offset in places:
            if name in self.tensors:
                raise cursor.broken(f"it has the tensor {name} twice")
            if offset % alignment:
                raise cursor.broken(f"{name} does not begin at a multiple of {alignment} bytes")
            self.tensors[name] = TensorPlace(name, shape, form, first + offset)

    def value(self, key: str) -> Any:
        """A value as Python has it: bool, int, float, str, or a list of those. Raises KeyError, CorruptCheckpoint."""
        value = self.values[key]
        try:
            if isinstance(value, Text):
                return bytes(self._cursor.data[value.start : value.end]).decode()
            return self._elements(value) if isinstance(value, Array) else value
        except UnicodeDecodeError as error:
            raise CorruptCheckpoint(f"{self.path}: {key} is not UTF-8") from error

    def _elements(self, array: Array) -> list[Any]:
        cursor = self._cursor
        if array.kind == _STRING:
            return [bytes(cursor.data[start:end]).decode() for start, end in cursor.texts(array.start, array.count)]
        form = _SCALARS[array.kind]
        elements = np.frombuffer(cursor.data, form, array.count, array.start).tolist()
        return list(elements)

    def _read_beginning(self, cursor: _Cursor) -> int:
        """Up to the metadata. Returns how many tensors there are."""
        if cursor.take(len(_MAGIC)) != _MAGIC:
            raise cursor.broken("it does not begin with GGUF")
        version = cursor.integer("<I")
        if version and version & 0xFFFF == 0:
            raise UnsupportedModel(
                f"{self.path} is a big-endian GGUF, which is not implemented; take the little-endian one"
            )
        if version not in _VERSIONS:
            raise UnsupportedModel(f"{self.path}: version {version} of GGUF is not implemented; 2 and 3 are")
        return cursor.integer("<Q")

    def _read_pairs(self, cursor: _Cursor) -> Iterator[tuple[str, Value]]:
        seen = set()
        for _ in range(cursor.few(cursor.integer("<Q"), _LEAST_PAIR, "keys")):
            key = cursor.name()
            if key in seen:
                raise cursor.broken(f"it has the key {key} twice")
            seen.add(key)
            yield key, cursor.value(cursor.integer("<I"))

    def _alignment(self) -> int:
        alignment = self.values.get("general.alignment", 32)
        if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment < 1 or alignment.bit_count() != 1:
            raise CorruptCheckpoint(f"{self.path}: general.alignment must be a power of two")
        return alignment


class _Cursor:
    """Reads one thing after the other, and nothing beyond the end."""

    def __init__(self, data: memoryview, path: Path) -> None:
        self.data = data
        self.at = 0
        self._path = path

    def broken(self, why: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{self._path} is not a whole GGUF file: {why}")

    def take(self, size: int) -> bytes:
        end = self.at + self.bounded(size, 1)
        taken = bytes(self.data[self.at : end])
        self.at = end
        return taken

    def bounded(self, count: int, size: int) -> int:
        """The count itself, if so many things of at least ``size`` bytes each may follow."""
        if count * size > len(self.data) - self.at:
            raise self.broken("it ends too early")
        return count

    def few(self, count: int, size: int, what: str) -> int:
        """The same for what is kept for each of them."""
        if self.bounded(count, size) > _MOST_THINGS:
            raise self.broken(f"it has {count} {what}, more than {_MOST_THINGS}")
        return count

    def scalar(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def integer(self, form: str) -> int:
        return int(self.scalar(form))

    def text(self) -> Text:
        """Where a text is; it is passed over."""
        size, start = self.integer("<Q"), self.at
        self.pass_over(size)
        return Text(start, self.at)

    def name(self) -> str:
        """Of a key or a tensor: errors are one line, and name them."""
        place = self.text()
        if place.end - place.start > _MOST_NAME:
            raise self.broken(f"a name has {place.end - place.start} bytes")
        try:
            name = bytes(self.data[place.start : place.end]).decode()
        except UnicodeDecodeError as error:
            raise self.broken("a name is not UTF-8") from error
        if not name.isprintable():
            raise self.broken("a name is not printable")
        return name

    def value(self, kind: int) -> Value:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise self.broken(f"it has a value of the unknown type {kind}")
        value: Value = self.scalar(_SCALARS[kind])
        return value

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """A tensor's name, shape, form, and where it begins after all headers."""
        name, dimensions = self.name(), self.integer("<I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self.broken(f"{name} has {dimensions} dimensions")
        shape = tuple(self.integer("<Q") for _ in range(dimensions))
        if not all(shape):
            raise self.broken(f"{name} is empty")
        return name, shape[::-1], self.integer("<I"), self.integer("<Q")

    def _array(self) -> Array:
        """Where an array is; it is passed over."""
        kind, count = self.integer("<I"), self.integer("<Q")
        start = self.at
        if kind == _STRING:
            self.bounded(count, _LENGTH.size)
            for _, end in self.texts(start, count):
                self.at = end
        elif kind in _SCALARS:
            self.pass_over(count * struct.calcsize(_SCALARS[kind]))
        else:
            raise self.broken(f"it has an array of the unknown type {kind}")
        return Array(kind, count, start)

    def pass_over(self, size: int) -> None:
        """Pass over so many bytes."""
        self.at += self.bounded(size, 1)

    def texts(self, at: int, count: int) -> Iterator[tuple[int, int]]:
        """The first and the past-the-last byte of each text of an array."""
        length_at: Callable[..., tuple[int]] = _LENGTH.unpack_from
        data, last = self.data, len(self.data)
        for _ in range(count):
            start = at + _LENGTH.size
            if start > last:
                raise self.broken("it ends too early")
            at = start + length_at(data, at)[0]
            if at > last:
                raise self.broken("it ends too early")
            yield start, at


def _mapped(path: Path) -> Bytes:
    """All bytes of a file, in a private mapping: torch takes no read-only arrays, and nothing here writes.

    Nothing is reserved for copies of its pages, so a file may be larger than memory.
    """
    try:
        with path.open("rb") as file:
            flags, protection = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            return np.frombuffer(mmap.mmap(file.fileno(), 0, flags=flags, prot=protection), np.uint8)
    except FileNotFoundError as error:
        raise CheckpointNotFound(f"{path} does not exist") from error
    except OSError as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CorruptCheckpoint(f"{path} is not a whole GGUF file: it is empty") from error
