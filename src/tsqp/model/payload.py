"""Tensors as the bytes that cross the line, without a copy where none is needed."""

from __future__ import annotations

import math

import torch

from tsqp.errors import ProtocolError
from tsqp.spec.dtype import DtypeName

TORCH_DTYPES: dict[DtypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DTYPE_NAMES_BY_TORCH: dict[torch.dtype, DtypeName] = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, aliasing its memory: little-endian, row-major."""
    return tensor.view(torch.uint8).numpy().data.cast("B")


def bytes_tensor(payload: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor over received bytes, aliasing them. Raises ProtocolError when the size is not that of ``shape``."""
    expected = math.prod(shape) * dtype.itemsize
    if payload.nbytes != expected:
        raise ProtocolError(f"a payload of {payload.nbytes} bytes where {expected} were expected")
    tensor = torch.frombuffer(payload, dtype=torch.uint8)
    if tensor.data_ptr() % dtype.itemsize:  # small frames may lie anywhere in a transport's receive buffer
        tensor = tensor.clone()
    return tensor.view(dtype).view(shape)
