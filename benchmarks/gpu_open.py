"""``python -m benchmarks.gpu_open``: ``open`` on a GPU beside transformers there, a prompt and decode steps after it.

A prompt is taken in a number of micro-batches that is said, and not in those that the first prompts are tried with, so
that all runs of one figure are of one setting; partition ``layer`` has none. Prints one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console

from tsqp.api.config import ComputeConfig, RunConfig, WorkerConfig
from tsqp.bench.device import device_figures
from tsqp.bench.names import PeerName
from tsqp.bench.split import bench_split
from tsqp.bench.workload import Workload
from tsqp.errors import TsqpError


def measured(
    run: RunConfig, work: Workload, others: Sequence[int], peer: PeerName | None, console: Console
) -> dict[str, Any]:
    """Both phases beside ``peer``, and prompts by themselves in ``others`` micro-batches. Raises TsqpError."""
    alone = []
    for count in others:
        other = replace(run, compute=replace(run.compute, micro_batches=count))
        found = bench_split(other, replace(work, steps=0), "none", None, console)
        alone.append({"micro_batches": count, "prefill": found["prefill"]})
    both = bench_split(run, work, peer, None, console)
    return {
        "benchmark": "gpu-open",
        "model": run.model,
        "partition": run.compute.partition,
        "micro_batches": run.compute.micro_batches,
        "prefill": both["prefill"],
        "decode": both["decode"],
        "prefill_in_others": alone,
        **device_figures(run.worker.device),
    }


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_open")
    parser.add_argument("--model", default="synthetic:llama-3.2-1b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--partition", choices=["linear", "layer"], required=True)
    parser.add_argument("--peer", choices=["transformers", "none"])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--micro-batches", type=int, default=[1], nargs="+", help="of partition linear; beside a peer in the first"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu-open: there is no CUDA device here", file=sys.stderr)
        return 1
    first, *others = options.micro_batches
    if options.partition == "layer":
        first, others = None, []
    compute = ComputeConfig(partition=options.partition, micro_batches=first)
    run = RunConfig(options.model, "open", WorkerConfig(device=options.device), compute=compute)
    work = Workload(options.tokens, options.steps, options.runs)
    try:
        result = measured(run, work, others, options.peer, Console(stderr=True, force_terminal=False))
    except TsqpError as error:
        print(f"gpu-open: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
