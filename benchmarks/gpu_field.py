"""``python -m benchmarks.gpu_field``: the CUDA worker's exact products mod p beside bfloat16 GEMMs of the same shapes.

Prints one JSON object: every product is compared with int64 arithmetic on sampled columns before it is timed. Medians
of device events. Needs torch, numpy and numba only.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable

import torch

from tsqp.arith.modulus import P
from tsqp.arith.product import BlockedKernel
from tsqp.arith.self_test import pick_kernel
from tsqp.arith.tensor_cores import DeviceFieldWeights

GROUPS = {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)}  # Llama-3.2-1B
ROWS = (1, 16, 1024)
RUNS = 20
SAMPLED = 64  # columns that are compared


def median_ms(work: Callable[[], object]) -> float:
    """Median time of ``work`` on the device, in milliseconds, after three runs that are not counted."""
    times = []
    for run in range(RUNS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        if run >= 3:
            times.append(start.elapsed_time(end))
    return float(statistics.median(times))


def is_exact(x: torch.Tensor, wq: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether y int32 (T, N) is x·wqᵀ mod p in the first and last columns, by int64 sums of reduced terms."""
    columns = torch.cat([torch.arange(SAMPLED // 2), torch.arange(len(wq) - SAMPLED // 2, len(wq))])
    for column in columns.tolist():
        terms = (x.long() * wq[column].long()) % P  # each below 2³¹: sums of 8,192 of them fit
        if not torch.equal(terms.sum(dim=1) % P, y[:, column].long()):
            return False
    return True


def measure(name: str, rows: int, device: torch.device) -> dict[str, object]:
    """One shape: exactness, time of the field product and of the bfloat16 GEMM."""
    n, k = GROUPS[name]
    generator = torch.Generator().manual_seed(rows)
    wq = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
    x = torch.randint(0, P, (rows, k), dtype=torch.int64, generator=generator).int()
    x[0, :4] = torch.tensor([0, P - 1, P // 2, P // 2 + 1])
    weights = DeviceFieldWeights.of(wq.to(device), pick_kernel(device))
    there, out = x.to(device), torch.empty(rows, n, dtype=torch.int32, device=device)
    weights.product(there, 4, out=out)
    exact = is_exact(x, wq, out.cpu())
    a = torch.randn(rows, k, device=device, dtype=torch.bfloat16)
    b = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    field, gemm = median_ms(lambda: weights.product(there, 4, out=out)), median_ms(lambda: a @ b.t())
    return {"group": name, "rows": rows, "exact": exact, "field_ms": field, "bf16_ms": gemm, "ratio": field / gemm}


def main() -> None:
    device = torch.device("cuda", 0)
    found = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "commit": os.environ.get("TSQP_COMMIT"),
        "blocked_kernel": isinstance(pick_kernel(device), BlockedKernel),
        "runs": RUNS,
        "products": [measure(name, rows, device) for name in GROUPS for rows in ROWS],
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
