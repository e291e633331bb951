"""The device a worker computes on, and the backend for it."""

from __future__ import annotations

import re

import torch

from tsqp.errors import OptionError
from tsqp.model.accelerator import TorchCuda, why_none
from tsqp.untrusted.backends.base import Backend
from tsqp.untrusted.backends.cpu import CpuBackend


def pick_device(name: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:n``. Raises OptionError for another name, or a device that is not there."""
    if name == "cpu":
        return torch.device("cpu")
    if "," in name:
        raise OptionError(f"one worker computes on one device, not on '{name}': start a worker for each device")
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise OptionError(f"unknown device '{name}': use cpu, cuda or cuda:n")
    count = torch.cuda.device_count()
    index = int(match[1] or 0)
    if index >= count:
        reason = None if count else why_none(TorchCuda())
        why = f"; {reason}" if reason else ""
        raise OptionError(f"there is no device '{name}' here: {count} CUDA devices found{why}")
    return torch.device("cuda", index)


def backend_for(device: torch.device) -> Backend:
    """What computes on a device. Raises RuntimeError where CUDA cannot be set up."""
    if device.type == "cpu":
        return CpuBackend()
    from tsqp.untrusted.backends.cuda import CudaBackend
    from tsqp.untrusted.backends.torch_driver import TorchDriver

    return CudaBackend(TorchDriver(device))
