"""What a number format or a protection costs in quality: the perplexity of a real text in each mode.

    python -m benchmarks.quality [--model default] [--tokens 2049] [--text FILE]

Writes benchmarks/results/quality.json and prints the same as a table; ratios are to float32.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import RESULTS, add_dirty_ok, check_tree, machine
from tsqp import LLM, ComputeConfig
from tsqp.bench.progress import watched
from tsqp.cli.evaluate import measure
from tsqp.cores import cores

PROSE = Path(__file__).parents[1] / "tests" / "data" / "prose.txt"
WINDOW, STRIDE = 1024, 512
MODES: dict[str, tuple[Any, ComputeConfig]] = {
    "float32": ("open", ComputeConfig(dtype="float32")),
    "bfloat16": ("open", ComputeConfig(dtype="bfloat16")),
    "int8": ("open", ComputeConfig(dtype="int8")),
    "bfloat16, int8 wire": ("open", ComputeConfig(dtype="bfloat16", wire_dtype="int8")),
    "int8, int8 wire": ("open", ComputeConfig(dtype="int8", wire_dtype="int8")),
    "verified": ("verified", ComputeConfig()),
    "masked": ("masked", ComputeConfig()),
    "masked, int8 keys and values": ("masked", ComputeConfig(kv_dtype="int8")),
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--tokens", type=int, default=2049)
    parser.add_argument("--text", type=Path, default=PROSE)
    parser.add_argument("--output", type=Path, default=RESULTS / "quality.json")
    add_dirty_ok(parser)
    options = parser.parse_args()
    check_tree(options)
    console = Console()
    text = options.text.read_text(encoding="utf-8")
    results: dict[str, dict[str, Any]] = {}
    for name in watched(list(MODES), console, "measuring"):
        protection, compute = MODES[name]
        with LLM(options.model, protection=protection, compute=replace(compute, threads=cores())) as llm:
            results[name] = measure(llm, text, tokens=options.tokens, window=WINDOW, stride=STRIDE)
    table = Table(title=f"{options.model}, {options.text.name}, {options.tokens} tokens", title_justify="left")
    for column in ("", "perplexity", "ratio", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    for name, result in results.items():
        result["ratio"] = result["perplexity"] / results["float32"]["perplexity"]
        table.add_row(name, f"{result['perplexity']:.4f}", f"{result['ratio']:.4f}", f"{result['seconds']:.1f}")
    console.print(table)
    whole = {
        "benchmark": "quality",
        "model": options.model,
        "text": options.text.name,
        "modes": results,
        "machine": machine(),
    }
    options.output.write_text(json.dumps(whole, indent=2) + "\n")
    console.print(f"written to {options.output}")


if __name__ == "__main__":
    main()
