"""What the split costs: prefill and decode of `linear` over ipc against plain transformers, in alternation.

    python -m benchmarks.split [--model synthetic:llama-3.2-1b] [--tokens 1024] [--steps 16] [--runs 5]

Both sides and the peer share the same cores. The ceilings are measured first: what this machine can multiply and
read per second bounds every figure. Writes one JSON file under benchmarks/results/ and prints the same as a table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: the worker uses the same cores

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.machine import RESULTS, machine
from tsqp import LLM, SamplingParams
from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.hf_config import config_from_spec
from tsqp.checkpoint.shapes import tensor_shapes
from tsqp.model.payload import TORCH_DTYPES
from tsqp.spec.groups import linear_groups

ORIGIN_PREFILL_S = 50.0  # the first program, 1,024 tokens at the 1B shape in float32, on a 2-core machine


def main() -> None:
    """Measure, print, write."""
    options = parse()
    console = Console()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    dtype = TORCH_DTYPES[options.dtype]
    ceilings = measure_ceilings(dtype)
    console.print(
        f"ceilings on {threads} threads, {options.dtype}: {ceilings['gemm_flop_per_s'] / 1e12:.2f} TFLOP/s, "
        f"weights read at {ceilings['gemv_bytes_per_s'] / 1e9:.1f} GB/s"
    )
    tokens = torch.randint(0, 256, (options.tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    peer = load_peer(options.model, dtype)
    seconds: dict[str, list[float]] = {"ours.prefill": [], "ours.decode": [], "peer.prefill": [], "peer.decode": []}
    with LLM(options.model, protection="open", dtype=options.dtype, threads=threads) as llm:
        session = llm.session
        if session is None:
            raise SystemExit("the benchmark needs a worker")
        runs: list[tuple[str, Callable[[], tuple[float, float]]]] = [
            ("ours", lambda: run_ours(llm, tokens, options.steps)),
            ("peer", lambda: run_peer(peer, tokens, options.steps)),
        ]
        for _, measure in runs:
            measure()  # warm up
        for _ in track(range(options.runs), console=console, description="measuring"):
            for name, measure in runs:
                prefill_s, decode_s = measure()
                seconds[f"{name}.prefill"].append(prefill_s)
                seconds[f"{name}.decode"].append(decode_s / options.steps)
        result = {
            "benchmark": "split",
            "model": options.model,
            "partition": "linear",
            "protection": "open",
            "transport": session.channel.transport,
            "dtype": options.dtype,
            "tokens": options.tokens,
            "decode_steps": options.steps,
            "threads": threads,
            "runs": options.runs,
            "ceilings": ceilings,
            "limit": limits(options.model, options.tokens, ceilings),
            "prefill": figures(seconds, "prefill"),
            "decode": figures(seconds, "decode"),
            "origin_prefill_s": ORIGIN_PREFILL_S if options.model == "synthetic:llama-3.2-1b" else None,
            "machine": machine(),
        }
    print_result(result, console)
    path = options.output or RESULTS / f"split-{options.model.replace('synthetic:', '')}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"written to {path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="synthetic:llama-3.2-1b")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=16, help="decode steps after the prompt")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(TORCH_DTYPES))
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def measure_ceilings(dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of a large GEMM and bytes/s of a matrix-vector product, the best that prefill and decode could do."""
    weight = torch.randn(8192, 2048).to(dtype)
    many, one = torch.randn(1024, 2048).to(dtype), torch.randn(1, 2048).to(dtype)
    gemm_s = median_seconds(lambda: F.linear(many, weight))
    gemv_s = median_seconds(lambda: F.linear(one, weight), runs=50)
    return {
        "gemm_flop_per_s": 2 * many.shape[0] * weight.numel() / gemm_s,
        "item_bytes": weight.element_size(),
        "gemv_bytes_per_s": weight.numel() * weight.element_size() / gemv_s,
    }


def limits(model: str, tokens: int, ceilings: dict[str, float]) -> dict[str, float]:
    """Seconds that the linear layers alone need at these rates: prefill of ``tokens``, decode of one token."""
    spec = open_checkpoint(model).spec
    groups = linear_groups(spec)
    head = groups.pop("lm_head")
    layers = spec.num_layers * sum(group.in_features * group.out_features for group in groups.values())
    once = head.in_features * head.out_features
    return {
        "prefill_s": 2 * (tokens * layers + once) / ceilings["gemm_flop_per_s"],
        "decode_s": (layers + once) * ceilings["item_bytes"] / ceilings["gemv_bytes_per_s"],
    }


def median_seconds(work: Callable[[], object], runs: int = 7) -> float:
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def load_peer(model: str, dtype: torch.dtype) -> Any:
    """The same weights in transformers."""
    checkpoint = open_checkpoint(model)
    config = LlamaConfig(**{k: v for k, v in config_from_spec(checkpoint.spec, "float32").items() if k != "dtype"})
    with torch.device("meta"):
        peer = AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = {name: checkpoint.tensor(name).to(dtype) for name in tensor_shapes(checkpoint.spec)}
    peer.load_state_dict(weights, strict=False, assign=True)
    peer.tie_weights()
    # Built on the meta device, its frequency table has no values yet.
    peer.model.rotary_emb = type(peer.model.rotary_emb)(config)
    left = [name for name, parameter in peer.named_parameters() if parameter.is_meta]
    if left:
        raise SystemExit(f"the peer lacks weights: {left[:3]}")
    return peer.eval()


def run_ours(llm: LLM, tokens: list[int], steps: int) -> tuple[float, float]:
    """Seconds of prefill and of ``steps`` decode steps."""
    llm.stats.reset()
    llm.generate(tokens, SamplingParams(max_tokens=steps + 1, ignore_eos=True))
    return llm.stats.prefill_s, llm.stats.decode_s


def run_peer(peer: Any, tokens: list[int], steps: int) -> tuple[float, float]:
    """The same with transformers: one pass over the prompt, then one token at a time with its cache."""
    with torch.inference_mode():
        start = time.perf_counter()
        out = peer(torch.tensor([tokens]), use_cache=True, logits_to_keep=1)
        prefilled = time.perf_counter()
        for _ in range(steps):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = peer(token, past_key_values=out.past_key_values, use_cache=True)
        return prefilled - start, time.perf_counter() - prefilled


def figures(seconds: dict[str, list[float]], phase: str) -> dict[str, object]:
    """Medians of one phase, with the peer's and the ratio: below 1 is faster than the peer."""
    ours, peer = (statistics.median(seconds[f"{name}.{phase}"]) for name in ("ours", "peer"))
    return {
        "seconds": ours,
        "peer": {"name": f"transformers {version('transformers')}", "seconds": peer},
        "ratio": ours / peer,
        "all_seconds": {"ours": seconds[f"ours.{phase}"], "peer": seconds[f"peer.{phase}"]},
    }


def print_result(result: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{result['model']}, {result['tokens']} tokens, {result['dtype']}", title_justify="left")
    for column in ("", "ours, s", "transformers, s", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for phase, label in (("prefill", "prefill"), ("decode", "decode, per token")):
        row = result[phase]
        table.add_row(label, f"{row['seconds']:.4f}", f"{row['peer']['seconds']:.4f}", f"{row['ratio']:.2f}")
    console.print(table)
    if result["origin_prefill_s"]:
        faster = result["origin_prefill_s"] / result["prefill"]["seconds"]
        console.print(f"the origin's prefill took {result['origin_prefill_s']:.1f} s: {faster:.0f} times as long")


if __name__ == "__main__":
    main()
