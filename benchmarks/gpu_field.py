"""``python -m benchmarks.gpu_field``: exact products mod p on CUDA beside bfloat16 GEMMs of the same shapes.

Every product is compared with another exact one, in float64, before it is timed: Triton's kernel, what takes its
place without Triton (digits, ``_int_mm``, a join), and with ``--candidates`` other tiles. Times are medians, replayed
from a CUDA graph (``field_ms``) over as many weights as no cache holds, and between events (``started_ms``), which has
what starting from Python costs. Prints one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.gpu_device import described
from tsqp.arith.modulus import P
from tsqp.arith.product import DigitKernel
from tsqp.arith.self_test import pick_kernel
from tsqp.arith.tensor_cores import DeviceFieldWeights, TensorCoreKernel
from tsqp.arith.triton_field import CANDIDATES, Tiles, TritonKernel
from tsqp.bench.gpu import Work, graph_ms, stream_ms
from tsqp.bench.gpu_ceilings import ceilings

GROUPS = {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)}  # Llama-3.2-1B
ROWS = (1, 16, 1024)
READ_BYTES = 256 << 20  # of weights, in turn: more than the L2 cache of any GPU

Timer = Callable[[Work], float]
Replay = Callable[[Sequence[Work]], float]


class Case:
    """One shape: numbers, weights often enough that no cache holds them, and room for a product."""

    def __init__(self, group: str, rows: int, device: torch.device, shape: tuple[int, int] | None = None) -> None:
        n, k = shape or GROUPS[group]
        generator = torch.Generator().manual_seed(rows)
        self.group, self.rows, self.device = group, rows, device
        self.wq = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
        self.x = torch.randint(0, P, (rows, k), dtype=torch.int64, generator=generator).int()
        self.x[0, :4] = torch.tensor([0, P - 1, P // 2, P // 2 + 1])
        self.there = self.x.to(device)
        self.copies = [self.wq.to(device).clone() for _ in range(max(1, READ_BYTES // (n * k)) if shape is None else 1)]
        self.out = torch.empty(rows, n, dtype=torch.int32, device=device)

    def works(self, kernel: DigitKernel) -> list[Work]:
        """The product by each copy of the weights."""
        every = [DeviceFieldWeights.of(wq, kernel) for wq in self.copies]
        return [partial(weights.product, self.there, 4, out=self.out) for weights in every]

    def gemms(self) -> list[Work]:
        """The product of the same shape in bfloat16, as often."""
        a = torch.randn(self.x.shape, device=self.device).to(torch.bfloat16)
        every = [torch.randn(self.wq.shape, device=self.device).to(torch.bfloat16) for _ in self.copies[::2]]
        return [partial(torch.mm, a, b.t()) for b in every]

    def is_exact(self) -> bool:
        """Whether ``out`` is x·wqᵀ mod p."""
        return torch.equal(self.out.long(), product_mod_p(self.there, self.copies[0]))


def product_mod_p(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x·wᵀ mod p, int64 (T, N), on the device of x (T, K) and w (N, K), by two products in float64.

    Halves of 16 bits times weights: a sum of K ≤ 132,104 terms stays below 2¹⁶ · 127 · K < 2⁵³, so float64 is exact.
    """
    numbers, weights = x.long(), w.double().t()
    low, high = ((part.double() @ weights).long() for part in (numbers & 0xFFFF, numbers >> 16))
    return ((high % P << 16) + low) % P


def measure(case: Case, kernel: DigitKernel, timer: Timer, replay: Replay) -> dict[str, object]:
    """Exactness and times of one kernel."""
    case.out.fill_(-5)  # what was not written must not be right by chance
    works = case.works(kernel)
    works[0]()
    return {"exact": case.is_exact(), "field_ms": replay(works), "started_ms": timer(works[0])}


def compare(case: Case, picked: DigitKernel, timer: Timer, replay: Replay) -> dict[str, object]:
    """The kernel that a worker would take, the one without Triton, and the GEMM."""
    gemms = case.gemms()
    bf16 = {"bf16_ms": replay(gemms), "bf16_started_ms": timer(gemms[0])}
    found = measure(case, picked, timer, replay)
    without = measure(case, TensorCoreKernel(), timer, replay)
    ratio = float(str(found["field_ms"])) / bf16["bf16_ms"]
    return {"group": case.group, "rows": case.rows, **found, **bf16, "ratio": ratio, "int_mm": without}


def candidates(case: Case, tiles: Sequence[Tiles], timer: Timer, replay: Replay) -> list[dict[str, object]]:
    """Other tiles at one shape. One that does not compile or does not fit has its error in place of times."""
    found = []
    for one in tiles:
        try:
            times = measure(case, TritonKernel(tiles=one), timer, replay)
        except Exception as error:  # triton's errors have no common kind
            times = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        found.append({"group": case.group, "rows": case.rows, "tiles": str(one), **times})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_field")
    parser.add_argument("--candidates", action="store_true", help="measure other tiles too, at 16 and 1,024 rows")
    options = parser.parse_args()
    device = torch.device("cuda", 0)
    picked = pick_kernel(device)
    found = {"gpu": described(device), "gpu_ceilings": ceilings(device), "kernel": type(picked).__name__}
    products, others = [], []
    for name in GROUPS:
        for rows in ROWS:
            case = Case(name, rows, device)
            products.append(compare(case, picked, stream_ms, graph_ms))
            if options.candidates and rows > 1 and name in ("gate_up", "down") and isinstance(picked, TritonKernel):
                fitting = [tiles for tiles in CANDIDATES if tiles.split == (rows > 16)]
                others += candidates(case, fitting, stream_ms, graph_ms)
    print(json.dumps({**found, "products": products, "candidates": others}))


if __name__ == "__main__":
    main()
