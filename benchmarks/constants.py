"""What ``tsqp plan`` computes from, measured on this machine, and what a GPU was measured to do.

    python -m benchmarks.constants [--runs 5]

``tsqp bench constants``, with the devices whose products have a file of their own beside it. Writes
``benchmarks/results/constants.json``, and the same beside the code, so that ``tsqp plan`` works wherever it is
installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.machine import RESULTS, add_dirty_ok, check_tree
from tsqp.bench.constants import bench_constants
from tsqp.bench.show import table

PACKAGED = Path(__file__).parents[1] / "src" / "tsqp" / "plan" / "constants.json"
GPU_FIELD = RESULTS / "gpu-field.json"
# Of Llama-3.2-1B, as benchmarks/gpu_field.py had them: (out, in).
SHAPES = {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)}
MEMORY = {"h200": 141_000_000_000}  # bytes, as its maker says


def h200(found: dict[str, Any]) -> dict[str, Any]:
    """A device of the constants, from products mod p that were timed on it.

    ``call_s``: the median of products of one row, whose time does not depend on their size. ``many_s``: from the
    largest product of 1,024 rows. ``weight_s``: of the bfloat16 product of one row with most weights, by its bytes:
    the exact one of few rows does not show it. Nothing else of a GPU is known; both modes have what masked has.
    """
    rows = {(one["group"], one["rows"]): one for one in found["products"]}
    call_s = statistics.median(rows[group, 1]["field_ms"] for group in SHAPES) * 1e-3
    weights = SHAPES["gate_up"][0] * SHAPES["gate_up"][1]
    weight_s = rows["gate_up", 1]["bf16_ms"] * 1e-3 / (2 * weights)
    many_s = (rows["gate_up", 1024]["field_ms"] * 1e-3 - call_s - weights * weight_s) / (weights * 1024)
    product = {"call_s": call_s, "weight_s": weight_s, "few_s": many_s, "many_s": many_s}
    return {
        "source": "benchmarks/results/gpu-field.json",
        "cores": None,
        "memory": MEMORY["h200"],
        "products": {"masked": product, "verified": product},
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path, nargs="+", default=[RESULTS / "constants.json", PACKAGED])
    add_dirty_ok(parser)
    options = parser.parse_args()
    check_tree(options)
    console = Console()
    result = bench_constants(options.runs, console)
    result["devices"]["h200"] = h200(json.loads(GPU_FIELD.read_text(encoding="utf-8")))
    console.print(table(result))
    for path in options.output:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
