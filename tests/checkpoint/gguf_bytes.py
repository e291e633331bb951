"""GGUF files byte by byte, as the format's description has them: also such that no library writes."""

from __future__ import annotations

import struct
from collections.abc import Sequence

STRING, ARRAY = 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, elements: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + elements


def tensor(name: str, dimensions: Sequence[int], form: int, offset: int = 0) -> bytes:
    """``dimensions``: the innermost first, as the file has them."""
    sizes = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return text(name) + sizes + struct.pack("<IQ", form, offset)


def gguf_bytes(
    pairs: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    alignment: int = 32,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """``counts``: what the file says that it has, of tensors and of pairs; what it has when not given."""
    said = counts or (len(tensors), len(pairs))
    header = b"GGUF" + struct.pack("<IQQ", version, *said) + b"".join(pairs) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + data
