"""Products of few rows: how fast they read their weights, beside the machine and beside torch's own.

    python -m benchmarks.few_rows [--model synthetic:llama-3.2-1b] [--rows 1 2 4 8 16] [--runs 7]

For each linear group of the model, 256 MB of weights are read once by each way in turn: ``read`` (their sum, which no
product can outrun by much), ``picked`` (the kernel that the self-test chose on this machine) and ``int_mm``
(``OffsetKernel``). x has 4 digits (masked rows and pads), 2 digits (verified rows) or 1 (int8). Both ways must
give equal products, or there is no result. Of bfloat16 weights ``loops`` are ours and ``linear`` is torch's. Medians
count; the best run is beside it, since other processes may use the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: as in a worker, which shares its cores

import torch
import torch.nn.functional as F

from benchmarks.machine import RESULTS, add_dirty_ok, check_tree, machine
from tsqp.arith.field import MAX_SMALL, FieldWeights
from tsqp.arith.modulus import P
from tsqp.arith.product import DigitKernel, OffsetKernel
from tsqp.arith.self_test import pick_kernel
from tsqp.bench.ceilings import WEIGHTS_BYTES, ceilings
from tsqp.bench.reading import reading
from tsqp.checkpoint import open_checkpoint
from tsqp.config.groups import GroupName, linear_groups
from tsqp.cores import cores
from tsqp.model import bfloat16_rows
from tsqp.model.attention_tiles import HAS_DOT

GROUPS: tuple[GroupName, ...] = ("qkv", "o", "gate_up", "down")


def one_product(weights: FieldWeights, how: DigitKernel, x: torch.Tensor, digits: int) -> torch.Tensor:
    """int32 (T, N): mod p of uint32 or int16 rows by their digits, or sums of int8 rows."""
    if digits == 1:
        return how.accumulate(x, weights.wq)
    out = torch.empty(len(x), len(weights.wq), dtype=torch.int32)
    FieldWeights(weights.wq, weights.offsets, how).product(x, 4 if digits == 4 else 2, out=out)
    return out


def rows_of(rows: int, width: int, digits: int) -> torch.Tensor:
    """Random rows as each number of digits wants them."""
    if digits == 4:
        return torch.randint(0, P, (rows, width)).int()
    if digits == 2:
        return torch.randint(-MAX_SMALL, MAX_SMALL + 1, (rows, width)).short()
    return torch.randint(-127, 128, (rows, width), dtype=torch.int8)


def timed(ways: dict[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of each way, in turn, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs + 1):
        for name, work in ways.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {name: found[1:] for name, found in seconds.items()}


def rates(ways: dict[str, Callable[[], object]], size: int, runs: int) -> dict[str, float]:
    """GB/s of weights of ``size`` bytes by each way: of the median run and of the best."""
    found = {}
    for name, seconds in timed(ways, runs).items():
        found[f"{name}_gb_per_s"] = size / statistics.median(seconds) / 1e9
        found[f"{name}_best_gb_per_s"] = size / min(seconds) / 1e9
    return found


def measure_bfloat16(group: GroupName, columns: int, width: int, rows: int, runs: int) -> dict[str, Any]:
    """One shape in bfloat16, by our loops and by torch's product."""
    weights = [torch.randn(columns, width).bfloat16() for _ in range(max(1, WEIGHTS_BYTES // (2 * columns * width)))]
    x = torch.randn(rows, width).bfloat16()
    ways: dict[str, Callable[[], object]] = {
        "read": reading(weights),
        "loops": lambda: [bfloat16_rows.product(x, one, None) for one in weights],
        "linear": lambda: [F.linear(x, one) for one in weights],
    }
    size = 2 * columns * width * len(weights)
    return {"group": group, "rows": rows, "n": columns, "k": width, **rates(ways, size, runs)}


def measure(group: GroupName, copies: list[FieldWeights], rows: int, digits: int, runs: int) -> dict[str, Any]:
    """One shape: GB/s of weights by each way. Raises SystemExit where the ways differ."""
    (columns, width), picked, int_mm = copies[0].wq.shape, pick_kernel(torch.device("cpu")), OffsetKernel()
    x = rows_of(rows, width, digits)
    if not torch.equal(one_product(copies[0], picked, x, digits), one_product(copies[0], int_mm, x, digits)):
        raise SystemExit(f"{group}: {rows} rows of {digits} digits: the products differ")
    ways: dict[str, Callable[[], object]] = {
        "read": reading([weights.wq for weights in copies]),
        "picked": lambda: [one_product(weights, picked, x, digits) for weights in copies],
        "int_mm": lambda: [one_product(weights, int_mm, x, digits) for weights in copies],
    }
    shape = {"group": group, "rows": rows, "digits": digits, "n": columns, "k": width}
    return {**shape, **rates(ways, columns * width * len(copies), runs)}


def shown(result: dict[str, Any], kind: str) -> dict[str, Any]:
    """The same, once it was printed."""
    found = (f"{name.partition('_gb')[0]} {value:.1f}" for name, value in result.items() if name.endswith("_gb_per_s"))
    print(f"{result['group']}, {result['rows']} rows of {kind}, GB/s: {', '.join(found)}", flush=True)
    return result


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="synthetic:llama-3.2-1b")
    parser.add_argument("--groups", nargs="+", default=GROUPS, choices=GROUPS)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--digits", type=int, nargs="+", default=[4, 2, 1], choices=[1, 2, 4])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS / "few-rows.json")
    add_dirty_ok(parser)
    options = parser.parse_args()
    check_tree(options)
    torch.set_num_threads(cores())
    load, before, products, floats = os.getloadavg()[0], ceilings("bfloat16"), [], []
    for group in options.groups:
        shape = linear_groups(open_checkpoint(options.model).config)[group]
        wq = torch.randint(-127, 128, (shape.out_features, shape.in_features), dtype=torch.int8)
        copies = [FieldWeights.of(wq.clone(), OffsetKernel()) for _ in range(max(1, WEIGHTS_BYTES // wq.numel()))]
        for digits, rows in product(options.digits, options.rows):
            products.append(shown(measure(group, copies, rows, digits, options.runs), f"{digits} digits"))
        for rows in options.rows if HAS_DOT else ():
            one = measure_bfloat16(group, shape.out_features, shape.in_features, rows, options.runs)
            floats.append(shown(one, "bfloat16"))
    result = {
        "benchmark": "few_rows",
        "model": options.model,
        "threads": torch.get_num_threads(),
        "runs": options.runs,
        "kernel": type(pick_kernel(torch.device("cpu"))).__name__,
        "products": products,
        "bfloat16": floats,
        "load_before": load,
        "ceilings": before,
        "machine": machine(),
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
