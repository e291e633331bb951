"""The device's memory as a whole, which nothing else may use meanwhile: ``make gpu-check`` runs this alone."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from tsqp.launch.local import LocalWorker

MODEL = "synthetic:tiny"
RETURNED_WITHIN_S = 5.0
CONTEXT_BYTES = 64 << 20  # less than what a process on a GPU takes before it has any weights


def test_a_killed_worker_leaves_its_device_memory(device: torch.device) -> None:
    def used() -> int:
        free, total = torch.cuda.mem_get_info(device)
        return total - free

    torch.cuda.synchronize()
    before = used()
    with LocalWorker(MODEL, device=str(device), dtype="field", threads=2) as worker:
        worker.wait_ready()
        assert used() > before + CONTEXT_BYTES
        worker.kill()
        assert becomes(lambda: used() < before + CONTEXT_BYTES)


def becomes(true: Callable[[], bool]) -> bool:
    """Waits until it is so: a driver takes its time."""
    end = time.monotonic() + RETURNED_WITHIN_S
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.05)
    return true()
