"""The device a worker computes on."""

from __future__ import annotations

import re

import torch

from tsqp.errors import OptionError


def pick_device(name: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:n``. Raises OptionError for another name, or a device that is not there."""
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise OptionError(f"unknown device '{name}': use cpu, cuda or cuda:n")
    count = torch.cuda.device_count()
    index = int(match[1] or 0)
    if index >= count:
        raise OptionError(f"there is no device '{name}' here: {count} CUDA devices found")
    return torch.device("cuda", index)
