"""The origin's messages: tensors inside MessagePack, one request and one reply at a time. For ``bench origin`` alone.

A message is a map; a tensor in it is a map of shape, dtype name and raw bytes. Every tensor is copied on its way: out
of torch (``tobytes``), into the message (pack), into ZeroMQ (send), out of ZeroMQ (recv), out of the message (unpack)
and into torch (``copy``).
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import torch


def pack(message: dict[str, Any]) -> bytes:
    """Encode a map whose tensors are contiguous CPU tensors."""
    fields = {key: _packed(value) if isinstance(value, torch.Tensor) else value for key, value in message.items()}
    return msgspec.msgpack.encode(fields)


def unpack(frame: bytes) -> dict[str, Any]:
    """Decode what ``pack`` encoded, into tensors of their own memory."""
    fields = msgspec.msgpack.decode(frame)
    return {key: _unpacked(value) if isinstance(value, dict) else value for key, value in fields.items()}


def _packed(tensor: torch.Tensor) -> dict[str, Any]:
    array = tensor.contiguous().numpy()
    return {"shape": list(array.shape), "dtype": str(array.dtype), "data": array.tobytes()}


def _unpacked(fields: dict[str, Any]) -> torch.Tensor:
    array = np.frombuffer(fields["data"], dtype=fields["dtype"]).reshape(fields["shape"])
    return torch.from_numpy(array.copy())
