"""Tensors as the bytes that cross the line, without a copy where none is needed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from tsqp.arith.quantise import BLOCK_ELEMENTS, quantise_rows
from tsqp.config.dtype import SCALE_BYTES, DtypeName, WireDtype, payload_bytes
from tsqp.errors import ProtocolError

TORCH_DTYPES: dict[DtypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, aliasing its memory: little-endian, row-major."""
    return tensor.view(torch.uint8).numpy().data.cast("B")


def bytes_tensor(payload: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor over received bytes, aliasing them. Raises ProtocolError when the size is not that of ``shape``."""
    expected = math.prod(shape) * dtype.itemsize
    if payload.nbytes != expected:
        raise ProtocolError(f"a payload of {payload.nbytes} bytes where {expected} were expected")
    if not expected:
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

    def read(self, payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return bytes_tensor(payload, self.dtype, shape).to(dtype)


class Int8Format:
    """Rows along the last dimension as ``tsqp.arith.quantise`` makes them: all scales float32, then all values int8."""

    dtype = None

    def size(self, shape: tuple[int, ...]) -> int:
        return payload_bytes("int8", shape)

    def write(self, tensor: torch.Tensor, place: memoryview) -> None:
        scales, values = self._parts(place, tuple(tensor.shape))
        quantised = quantise_rows(tensor.reshape(values.shape))
        scales.copy_(quantised.scales.view(torch.uint8))  # as bytes: wherever the payload lies
        values.copy_(quantised.values)

    def read(self, payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if not math.prod(shape):  # the reply to a call without a product
            return torch.empty(shape, dtype=dtype)
        scale_bytes, values = self._parts(payload, shape)
        scales = scale_bytes.clone().view(torch.float32).unsqueeze(1)  # in memory of its own it is aligned
        tensor = torch.empty(values.shape, dtype=dtype)
        step = max(1, BLOCK_ELEMENTS // shape[-1])
        for first in range(0, len(tensor), step):
            rows = slice(first, first + step)
            tensor[rows] = values[rows] * scales[rows]
        return tensor.view(shape)

    def _parts(self, payload: memoryview, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """The scales' bytes, uint8 (4·rows,), and the values, int8 (rows, n): both alias the payload."""
        whole = bytes_tensor(payload, torch.uint8, (self.size(shape),))
        columns = shape[-1]
        split = math.prod(shape[:-1]) * SCALE_BYTES
        return whole[:split], whole[split:].view(torch.int8).view(-1, columns)


def wire_format(name: WireDtype) -> WireFormat:
    """The format of float payloads, by the name in the handshake."""
    return Int8Format() if name == "int8" else PlainFormat(TORCH_DTYPES[name])
