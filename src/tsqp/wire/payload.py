"""Tensors as the bytes that cross the line, without a copy where none is needed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from tsqp.arith.quantise import BLOCK_ELEMENTS, quantise_rows
from tsqp.config.dtype import SCALE_BYTES, DtypeName, WireDtype, payload_bytes
from tsqp.errors import ProtocolError
from tsqp.wire.device_memory import Payload

TORCH_DTYPES: dict[DtypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, aliasing its memory: little-endian, row-major."""
    return tensor.view(torch.uint8).numpy().data.cast("B")


def check_size(payload: Payload, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """How many bytes a payload has. Raises ProtocolError when that is not the size of a tensor of ``shape``."""
    expected = math.prod(shape) * dtype.itemsize
    if payload.nbytes != expected:
        raise ProtocolError(f"a payload of {payload.nbytes} bytes where {expected} were expected")
    return expected


def bytes_tensor(payload: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor over received bytes, aliasing them. Raises ProtocolError when the size is not that of ``shape``."""
    if not check_size(payload, dtype, shape):
        return torch.empty(shape, dtype=dtype)
    tensor = torch.frombuffer(payload, dtype=torch.uint8)
    if tensor.data_ptr() % dtype.itemsize:  # small frames may lie anywhere in a transport's receive buffer
        tensor = tensor.clone()
    return tensor.view(dtype).view(shape)


def lies_in(tensor: torch.Tensor, payload: memoryview) -> bool:
    """Whether a tensor of ``bytes_tensor`` aliases its payload. (Where alignment asks for it, it is a copy.)"""
    return payload.nbytes > 0 and tensor.data_ptr() == torch.frombuffer(payload, dtype=torch.uint8).data_ptr()


class WireFormat(Protocol):
    """How float tensors cross the line. A payload's size follows from the tensor's shape alone.

    ``dtype`` is that of the tensor whose bytes a payload is; None where it is not the bytes of one.
    """

    @property
    def dtype(self) -> torch.dtype | None: ...

    def size(self, shape: tuple[int, ...]) -> int:
        """Bytes of a payload."""

    def write(self, tensor: torch.Tensor, place: memoryview) -> None:
        """Write a tensor of any float dtype and device to ``place``, of exactly its payload's size."""

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor whose bytes are the payload, on the same device; it may be ``tensor`` itself."""

    def unpack(self, raw: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """What ``read`` gives, from a payload's bytes as a tensor on any device: of our dtype, or uint8 (size,)."""

    def read(self, payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The tensor as ``dtype``; it may alias the payload, otherwise each byte has been read once.

        Raises ProtocolError when the payload's size is not that of ``shape``.
        """


@dataclass(frozen=True)
class PlainFormat:
    """The tensor's own bytes."""

    dtype: torch.dtype

    def size(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * self.dtype.itemsize

    def write(self, tensor: torch.Tensor, place: memoryview) -> None:
        bytes_tensor(place, self.dtype, tuple(tensor.shape)).copy_(tensor)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.dtype)

    def unpack(self, raw: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return raw.to(dtype)

    def read(self, payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return bytes_tensor(payload, self.dtype, shape).to(dtype)


class Int8Format:
    """Rows along the last dimension as ``tsqp.arith.quantise`` makes them: all scales float32, then all values int8."""

    dtype = None

    def size(self, shape: tuple[int, ...]) -> int:
        return payload_bytes("int8", shape)

    def write(self, tensor: torch.Tensor, place: memoryview) -> None:
        self._fill(bytes_tensor(place, torch.uint8, (self.size(tuple(tensor.shape)),)), tensor)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        raw = torch.empty(self.size(tuple(tensor.shape)), dtype=torch.uint8, device=tensor.device)
        self._fill(raw, tensor)
        return raw

    def _fill(self, raw: torch.Tensor, tensor: torch.Tensor) -> None:
        scales, values = self._parts(raw, tuple(tensor.shape))
        quantised = quantise_rows(tensor.reshape(values.shape))
        scales.copy_(quantised.scales.view(torch.uint8))  # as bytes: wherever the payload lies
        values.copy_(quantised.values)

    def read(self, payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if not math.prod(shape):  # the reply to a call without a product
            return torch.empty(shape, dtype=dtype)
        return self.unpack(bytes_tensor(payload, torch.uint8, (self.size(shape),)), shape, dtype)

    def unpack(self, raw: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        scale_bytes, values = self._parts(raw, shape)
        scales = scale_bytes.clone().view(torch.float32).unsqueeze(1)  # in memory of its own it is aligned
        tensor = torch.empty(values.shape, dtype=dtype, device=raw.device)
        step = max(1, BLOCK_ELEMENTS // shape[-1])
        for first in range(0, len(tensor), step):
            rows = slice(first, first + step)
            tensor[rows] = values[rows] * scales[rows]
        return tensor.view(shape)

    def _parts(self, raw: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """The scales' bytes, uint8 (4·rows,), and the values, int8 (rows, n): both alias the payload's bytes."""
        columns = shape[-1]
        split = math.prod(shape[:-1]) * SCALE_BYTES
        return raw[:split], raw[split:].view(torch.int8).view(-1, columns)


def wire_format(name: WireDtype) -> WireFormat:
    """The format of float payloads, by the name in the handshake."""
    return Int8Format() if name == "int8" else PlainFormat(TORCH_DTYPES[name])
