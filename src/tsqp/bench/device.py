"""The device that a benchmark's worker computes on: refused before minutes are spent, and named in the result."""

from __future__ import annotations

from typing import Any

from tsqp.untrusted.backends.device import pick_devices

GPU = "gpu-"  # the beginning of the names of files with such results


def check_device(names: str) -> None:
    """Raises OptionError for a device that is not there."""
    pick_devices(names)


def first_device(names: str) -> str:
    """The device that a peer runs on: the worker's, or the first of several."""
    return names.partition(",")[0]


def prefix(names: str) -> str:
    """The beginning of a file's name, which tells results on a GPU from those on the CPU."""
    return GPU if names.startswith("cuda") else ""


def device_figures(names: str) -> dict[str, Any]:
    """What is said of a GPU in a result: what it is, and its ceilings; nothing of the CPU."""
    if not prefix(names):
        return {}
    from tsqp.bench.gpu import described
    from tsqp.bench.gpu_ceilings import ceilings

    device, *_ = pick_devices(names)
    return {"devices": names.split(","), "gpu": described(device), "gpu_ceilings": ceilings(device)}
