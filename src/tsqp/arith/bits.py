"""A tensor's memory as numpy has it, for compiled loops; kept with tensors that stay, since making it costs a call."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

_KEPT = "tsqp_bits"

Array = np.ndarray[Any, np.dtype[Any]]


def bits(tensor: torch.Tensor) -> Array:
    """The same memory: float32 and integers as they are, bfloat16, which numpy does not know, as uint16."""
    kept: Array | None = getattr(tensor, _KEPT, None)
    if kept is not None:
        return kept
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def keep_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, whose ``bits`` are at hand from now on if it is on the CPU; its memory must stay the same."""
    if tensor.device.type == "cpu":
        setattr(tensor, _KEPT, bits(tensor))
    return tensor
