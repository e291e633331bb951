"""What needs a CUDA device: skipped, by name, where there is none. ``make gpu-check`` runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in this folder."""
    there = torch.cuda.is_available()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not there:
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device here"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0)
