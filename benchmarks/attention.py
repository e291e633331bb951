"""Attention by torch (``old``), by compiled loops over bfloat16 (``new``) and over int8, in alternation.

    python -m benchmarks.attention [--threads N] [--runs N] [--old float32|bfloat16]

Writes benchmarks/results/attention.json and prints the same as a table. One layer of the Llama-3.2-1B shape. A prefill
counts the FLOP of the pairs of query and key that see each other, beside a large product of bfloat16. A decode step
counts the bytes of the keys and values that it reads, scales among them, in caches that together are larger than the
last-level cache, as those of a model's layers are; beside it, in the same alternation, the same bytes are added up.

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
from tsqp.config.dtype import SCALE_BYTES
from tsqp.config.model import ModelConfig
from tsqp.cores import cores
from tsqp.model.batch import Chunk, SequenceRows
from tsqp.model.block_attention import BlockAttention
from tsqp.model.cache import KVCache, query_dtype
from tsqp.model.local import TorchAttention
from tsqp.model.meter import Unmetered
from tsqp.model.operators import Attention
from tsqp.model.pending import run
from tsqp.wire.payload import TORCH_DTYPES

PREFILLS = [(0, 1024), (3072, 1024)]  # first position, rows
STEPS = [(1, 1024), (1, 8192), (16, 256), (16, 1024)]  # sequences, context
COLD_BYTES = 128 * 2**20
KEPT = {"new": torch.bfloat16, "int8": torch.int8}  # beside the caches of torch, ``old``
READ = {"new": "read", "int8": "read_int8"}  # what only adds up the same bytes
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
    dtypes = {"old": TORCH_DTYPES[options.old]} | KEPT
    cases = [_prefill(config, dtypes, position, rows, options.runs) for position, rows in PREFILLS]
    cases += [_steps(config, dtypes, sequences, context, options.runs) for sequences, context in STEPS]
    rates = higher(before, ceilings("bfloat16", threads=options.threads))
    console = Console()
    table = Table(title="attention of one layer, Llama-3.2-1B shape", title_justify="left")
    for column in ("case", "old ms", "new ms", "old / new", "new, of the limit", "int8 ms", "int8, of the limit"):
        table.add_column(column)
    for case in cases:
        new, eight = _of_limit(case, "new", rates), _of_limit(case, "int8", rates)
        ratio = case["old"]["ms"] / case["new"]["ms"]
        milliseconds = {name: f"{case[name]['ms']:.3f}" for name in dtypes}
        table.add_row(
            case["case"], milliseconds["old"], milliseconds["new"], f"{ratio:.1f}", new, milliseconds["int8"], eight
        )
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


def _of_limit(case: dict[str, Any], name: str, rates: dict[str, Any]) -> str:
    """The rate of one way in words; what it is of the limit goes into the case."""
    unit, sign = ("flop_per_s", "FLOP") if "flop_per_s" in case[name] else ("bytes_per_s", "B")
    limit = rates["gemm_flop_per_s"] if unit == "flop_per_s" else case[READ[name]]["bytes_per_s"]
    case[name]["of_limit"] = case[name][unit] / limit
    return f"{case[name][unit] / 1e9:.1f} G{sign}/s, {case[name]['of_limit']:.0%}"


def _prefill(config: ModelConfig, dtypes: Dtypes, position: int, rows: int, runs: int) -> dict[str, Any]:
    """``rows`` queries from ``position`` on, one sequence."""
    works = {name: _work(config, name, dtype, 1, position, rows, 1) for name, dtype in dtypes.items()}
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
    ways = dtypes | {READ[name]: dtypes[name] for name in READ}
    works = {name: _work(config, name, dtype, sequences, context - 1, 1, layers) for name, dtype in ways.items()}
    seconds = {name: value / layers for name, value in _alternating(works, runs).items()}
    held = {name: elements * dtype.itemsize for name, dtype in dtypes.items()}
    held["int8"] += elements // config.head_dim * SCALE_BYTES
    held |= {READ[name]: held[name] for name in READ}
    return {"case": f"{sequences} decode steps at {context} keys", "layers": layers} | {
        name: {"ms": 1e3 * value, "bytes_per_s": held[name] / value} for name, value in seconds.items()
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
                held.random_(-127, 128) if dtype == torch.int8 else held.normal_()
            for scales in cache.scales(layer):
                scales.fill_(1 / 127)
        cache.advance(position)
    spans = [SequenceRows(cache, position, i * rows, rows, last=True) for i, cache in enumerate(caches)]
    q = torch.randn(config.num_heads, sequences * rows, config.head_dim).to(query_dtype(dtype))
    out = torch.empty(sequences * rows, config.q_size, dtype=query_dtype(dtype))

    def read() -> None:
        for layer in range(layers):
            for cache in caches:
                for held in cache.view(layer, 0, position + rows):
                    held.view(torch.int64).sum()
                if dtype == torch.int8:
                    for scales in cache.scales(layer):
                        scales[:, : position + rows].view(torch.int64).sum()

    def work() -> None:
        chunk = attention.of(Chunk(0, tuple(spans)))
        for layer in range(layers):
            run(chunk.steps(layer, q, out))

    return read if name in READ.values() else work


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
