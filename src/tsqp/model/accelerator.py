"""What CUDA offers on this machine, in words: for ``tsqp doctor``, and for who asks for a device that is not there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from tsqp.arith.self_test import pick_kernel

LEAST_CAPABILITY = (8, 0)  # bfloat16 and int8 on tensor cores
_KERNEL_MODULE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class CudaDevice:
    """One device; ``capability`` is its compute capability."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int


class Cuda(Protocol):
    """What is asked of torch."""

    @property
    def built_for(self) -> str | None:
        """The CUDA version that torch was built for; None for a build without."""

    def trouble(self) -> str | None:
        """Why no device can be used, in one line: no driver, one that is too old, no device. None where one can."""

    def driver(self) -> str:
        """The driver's version."""

    def devices(self) -> list[CudaDevice]:
        """All of them."""

    def exact_kernel(self, index: int) -> str:
        """What multiplies 8-bit digits exactly on a device, by the self-test."""


class TorchCuda:
    """See Cuda."""

    built_for = torch.version.cuda

    def trouble(self) -> str | None:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
            return str(error).strip().splitlines()[0]
        return None if torch.cuda.device_count() else "there is no CUDA device"

    def driver(self) -> str:
        return driver_version(_KERNEL_MODULE)

    def devices(self) -> list[CudaDevice]:
        found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return [CudaDevice(one.name, (one.major, one.minor), one.total_memory) for one in found]

    def exact_kernel(self, index: int) -> str:
        return type(pick_kernel(torch.device("cuda", index))).__name__


def driver_version(path: Path) -> str:
    """As the kernel's module says it; ``unknown`` where it says nothing, as in some containers."""
    try:
        found = re.search(r"Module(?: for \S+)?\s+(\d+(?:\.\d+)+)", path.read_text())
    except (OSError, UnicodeDecodeError):
        found = None
    return found[1] if found else "unknown"


def why_none(cuda: Cuda) -> str | None:
    """Why workers cannot compute on CUDA; None where they can."""
    if cuda.built_for is None:
        return "this torch is built without CUDA"
    return cuda.trouble()


def described(cuda: Cuda) -> str:
    """The devices that there are, and what a worker on them uses."""
    devices = [
        f"cuda:{index} {one.name}, compute capability {'.'.join(map(str, one.capability))}, "
        f"{one.memory_bytes / 2**30:.0f} GiB, exact products by {cuda.exact_kernel(index)}"
        + (", older than what this is made for" if one.capability < LEAST_CAPABILITY else "")
        for index, one in enumerate(cuda.devices())
    ]
    together = ", or all of them: " + ",".join(f"cuda:{index}" for index in range(len(devices)))
    return (
        f"driver {cuda.driver()}, torch for CUDA {cuda.built_for}; {'; '.join(devices)}; a worker uses --device cuda:n"
        + (together if len(devices) > 1 else "")
    )
