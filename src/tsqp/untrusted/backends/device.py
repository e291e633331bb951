"""The device a worker computes on, and the backend for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tsqp.errors import OptionError
from tsqp.model.accelerator import TorchCuda, why_none
from tsqp.untrusted.backends.base import Backend
from tsqp.untrusted.backends.cpu import CpuBackend

if TYPE_CHECKING:
    from tsqp.untrusted.backends.many import ManyDevices


def pick_devices(names: str) -> list[torch.device]:
    """One device, or several CUDA devices with commas between them. Raises OptionError, as ``pick_device`` does."""
    each = names.split(",")
    if len(each) > 1 and "cpu" in each:
        raise OptionError(f"a worker computes on the CPU or on CUDA devices, not on '{names}'")
    found = [pick_device(name) for name in each]
    twice = next((device for n, device in enumerate(found) if device in found[:n]), None)
    if twice is not None:
        raise OptionError(f"device '{twice}' is named twice in '{names}'")
    return found


def pick_device(name: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:n``. Raises OptionError for another name, or a device that is not there."""
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise OptionError(f"unknown device '{name}': use cpu, cuda or cuda:n, or cuda:0,cuda:1")
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


def many_devices(devices: Sequence[torch.device]) -> ManyDevices:
    """What computes on several CUDA devices. Raises OptionError; RuntimeError where CUDA cannot be set up."""
    from tsqp.untrusted.backends.columns import ColumnsBackend
    from tsqp.untrusted.backends.host_memory import Arenas
    from tsqp.untrusted.backends.many import ManyDevices
    from tsqp.untrusted.backends.torch_driver import TorchDriver, cuda_runtime

    drivers = [TorchDriver(device) for device in devices]
    cuda_runtime()  # refused here, not by the first call
    arenas = Arenas(drivers[0])
    return ManyDevices([ColumnsBackend(driver, arenas=arenas) for driver in drivers], [str(one) for one in devices])
