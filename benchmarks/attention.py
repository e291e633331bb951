"""Attention by torch (``old``) and by compiled loops over bfloat16 (``new``), in alternation.

    python -m benchmarks.attention [--threads N] [--runs N] [--old float32|bfloat16]

Writes benchmarks/results/attention.json and prints the same as a table. One layer of the Llama-3.2-1B shape. A prefill
counts the FLOP of the pairs of query and key that see each other, beside a large product of bfloat16. A decode step
counts the bytes of the keys and values that it reads, in caches that together are larger than the last-level cache, as
those of a model's layers are; beside it, in the same alternation, the same bytes are only added up.

With one thread the clock is that of the thread, so that other work on the machine counts only for what it takes of the
memory's rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import RESULTS, add_dirty_ok, check_tree, machine
from tsqp.bench.ceilings import ceilings, higher
from tsqp.checkpoint import open_checkpoint
from tsqp.config.model import ModelConfig
from tsqp.cores import cores
from tsqp.model.batch import Chunk, SequenceRows
from tsqp.model.block_attention import BlockAttention
from tsqp.model.cache import KVCache
from tsqp.model.local import TorchAttention
from tsqp.model.meter import Unmetered
from tsqp.model.operators import Attention
from tsqp.model.pending import run
from tsqp.wire.payload import TORCH_DTYPES

PREFILLS = [(0, 1024), (3072, 1024)]  # first position, rows
STEPS = [(1, 1024), (1, 8192), (16, 256), (16, 1024)]  # sequences, context
COLD_BYTES = 128 * 2**20
Dtypes = dict[str, torch.dtype]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--old", default="float32", choices=["float32", "bfloat16"], help="the caches of torch")
    parser.add_argument("--output", type=Path, default=RESULTS / "attention.json")
    add_dirty_ok(parser)
    options = parser.parse_args()
    check_tree(options)
    torch.set_num_threads(options.threads)
    config = open_checkpoint("synthetic:llama-3.2-1b").config
    before = ceilings("bfloat16", threads=options.threads)
    dtypes = {"old": TORCH_DTYPES[options.old], "new": torch.bfloat16, "read": torch.bfloat16}
    cases = [_prefill(config, dtypes, position, rows, options.runs) for position, rows in PREFILLS]
    cases += [_steps(config, dtypes, sequences, context, options.runs) for sequences, context in STEPS]
    rates = higher(before, ceilings("bfloat16", threads=options.threads))
    console = Console()
    table = Table(title="attention of one layer, Llama-3.2-1B shape", title_justify="left")
    for column in ("case", "old ms", "new ms", "old / new", "new, of the limit"):
        table.add_column(column)
    for case in cases:
        unit = "flop_per_s" if "flop_per_s" in case["new"] else "bytes_per_s"
        limit = rates["gemm_flop_per_s"] if unit == "flop_per_s" else case["read"]["bytes_per_s"]
        case["of_limit"] = case["new"][unit] / limit
        old, new = case["old"]["ms"], case["new"]["ms"]
        rate = f"{case['new'][unit] / 1e9:.1f} G{'FLOP' if unit == 'flop_per_s' else 'B'}/s, {case['of_limit']:.0%}"
        table.add_row(case["case"], f"{old:.3f}", f"{new:.3f}", f"{old / new:.1f}", rate)
    console.print(table)
    whole = {
        "benchmark": "attention",
        "old": options.old,
        "runs": options.runs,
        "cases": cases,
        "ceilings": rates,
        "machine": machine(),
    }
    options.output.write_text(json.dumps(whole, indent=2) + "\n")
    console.print(f"written to {options.output}")


def _prefill(config: ModelConfig, dtypes: Dtypes, position: int, rows: int, runs: int) -> dict[str, Any]:
    """``rows`` queries from ``position`` on, one sequence."""
    works = {name: _work(config, name, dtypes[name], 1, position, rows, 1) for name in ("old", "new")}
    seconds = _alternating(works, runs)
    pairs = sum(range(position + 1, position + rows + 1))
    flop = 4 * pairs * config.num_heads * config.head_dim
    return {"case": f"prefill of {rows} rows from position {position}"} | {
        name: {"ms": 1e3 * value, "flop_per_s": flop / value} for name, value in seconds.items()
    }


def _steps(config: ModelConfig, dtypes: Dtypes, sequences: int, context: int, runs: int) -> dict[str, Any]:
    """One row for each sequence, over ``context`` keys."""
    elements = 2 * sequences * context * config.kv_size
    layers = max(1, COLD_BYTES // (2 * elements))
    works = {name: _work(config, name, dtype, sequences, context - 1, 1, layers) for name, dtype in dtypes.items()}
    seconds = {name: value / layers for name, value in _alternating(works, runs).items()}
    return {"case": f"{sequences} decode steps at {context} keys", "layers": layers} | {
        name: {"ms": 1e3 * value, "bytes_per_s": elements * dtypes[name].itemsize / value}
        for name, value in seconds.items()
    }


def _work(
    config: ModelConfig, name: str, dtype: torch.dtype, sequences: int, position: int, rows: int, layers: int
) -> Callable[[], None]:
    """Attention of ``layers`` layers, one after another, over caches of ``dtype``; or their caches added up."""
    config = replace(config, windows=(None,) * layers, num_layers=layers)
    attention: Attention
    attention = (TorchAttention if name == "old" else BlockAttention)(config.windows, Unmetered())
    caches = [KVCache(config, dtype) for _ in range(sequences)]
    for cache in caches:
        for layer in range(layers):
            for held in cache.reserve(layer, position + rows):
                held.normal_()
        cache.advance(position)
    spans = [SequenceRows(cache, position, i * rows, rows, last=True) for i, cache in enumerate(caches)]
    q = torch.randn(config.num_heads, sequences * rows, config.head_dim).to(dtype)
    out = torch.empty(sequences * rows, config.q_size, dtype=dtype)

    def read() -> None:
        for layer in range(layers):
            for cache in caches:
                for held in cache.view(layer, 0, position + rows):
                    held.view(torch.int64).sum()

    def work() -> None:
        chunk = attention.of(Chunk(0, tuple(spans)))
        for layer in range(layers):
            run(chunk.steps(layer, q, out))

    return read if name == "read" else work


def _alternating(works: dict[str, Callable[[], None]], runs: int) -> dict[str, float]:
    """The median seconds of each, one after another in each round."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in works}
    with torch.inference_mode():
        for work in works.values():
            work()
        for _ in range(runs):
            for name, work in works.items():
                start = clock()
                work()
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
