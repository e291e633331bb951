"""The GPU of a measurement, and the commit of a tree that may have travelled without its history."""

from __future__ import annotations

import os

import torch

from tsqp.bench import gpu, tree


def described(device: torch.device) -> dict[str, object]:
    """Device, driver, versions and commit. ``TSQP_COMMIT`` names that of a tree without its history."""
    return {**gpu.described(device), "commit": commit()}


def commit() -> str:
    """Of the code that is measured."""
    return os.environ.get("TSQP_COMMIT") or tree.commit()
