"""What a private adapter costs: a run with one on all seven matrices of each layer, over the same run without.

    python -m benchmarks.lora [--model synthetic:llama-3.2-1b] [--protection masked] [--rank 16] [--runs 7]

One model, one worker, one session: answers with the adapter and without take turns, and change places in every other
run. Pads are ready before each, and none are made meanwhile. The adapter has random numbers. ``decode_s`` is of one
token; ``ratio`` is the median over runs of the two decode times of one run. Medians count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from benchmarks.machine import RESULTS, add_dirty_ok, check_tree, machine
from tsqp import LLM, ComputeConfig, SamplingParams
from tsqp.api.config import GuardConfig, RunConfig
from tsqp.bench.pads import ready_for, with_pads
from tsqp.bench.workload import Workload
from tsqp.checkpoint import locate, open_checkpoint
from tsqp.checkpoint.hf_tensors import stored_shapes, stored_tensors
from tsqp.config.groups import LAYER_GROUPS, linear_groups
from tsqp.config.model import ModelConfig
from tsqp.cores import cores

ADAPTER = "measured"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="synthetic:llama-3.2-1b")
    parser.add_argument("--protection", default="masked", choices=["masked", "verified", "open", "local"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--output", type=Path, default=RESULTS / "lora.json")
    add_dirty_ok(parser)
    options = parser.parse_args()
    check_tree(options)
    work, console = Workload(options.tokens, options.steps, options.runs), Console()
    with tempfile.TemporaryDirectory() as directory:
        config = open_checkpoint(locate(options.model)).config
        lora = f"{ADAPTER}={write_adapter(Path(directory), config, options.rank)}"
        asked = RunConfig(
            options.model,
            options.protection,
            guard=GuardConfig(),
            compute=ComputeConfig(threads=options.threads, lora=(lora,)),
        )
        with LLM.of(with_pads(asked, 2 * (work.tokens + work.steps))) as llm:
            rows = measured(llm, work, console)
    result = {
        "benchmark": "lora",
        "model": options.model,
        "protection": options.protection,
        "rank": options.rank,
        "threads": options.threads,
        "tokens": work.tokens,
        "decode_steps": work.steps,
        "runs": work.runs,
        **rows,
        "machine": machine(),
    }
    console.print(f"decode with / without: {result['ratio']:.3f}; prefill: {result['prefill_ratio']:.3f}")
    options.output.write_text(json.dumps(result, indent=2) + "\n")


def measured(llm: LLM, work: Workload, console: Console) -> dict[str, Any]:
    """Both kinds of answers in turn, after one of each that does not count."""
    kinds: dict[str, str | None] = {"without": None, "with": ADAPTER}
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for run in range(-1, work.runs):
        for kind in sorted(kinds, reverse=run % 2 == 0):
            times = answer(llm, work, kinds[kind])
            if run >= 0:
                found[kind].append(times)
        if run >= 0:
            console.print({kind: f"{rows[-1]['decode_s'] * 1e3:.2f} ms" for kind, rows in found.items()})
    rows = {
        kind: {name: statistics.median(one[name] for one in times) for name in times[0]}
        | {"all_decode_s": [one["decode_s"] for one in times]}
        for kind, times in found.items()
    }
    return {"ratio": ratio(found, "decode_s"), "prefill_ratio": ratio(found, "prefill_s"), "rows": rows}


def ratio(found: dict[str, list[dict[str, float]]], name: str) -> float:
    """The median over runs of what one costs with the adapter, over what it costs without."""
    pairs = zip(found["with"], found["without"], strict=True)
    return statistics.median(own[name] / bare[name] for own, bare in pairs)


def answer(llm: LLM, work: Workload, lora: str | None) -> dict[str, float]:
    """Seconds of a prompt, of one decode step, and of what the adapter adds in one."""
    ready_for(llm, work.tokens + work.steps, work.steps + 1)
    llm.stats.reset()
    stream = llm.stream(work.prompt(), SamplingParams(max_tokens=work.steps + 1, ignore_eos=True), lora=lora)
    next(stream)
    of_prompt = llm.stats.operator_s.get("lora", 0.0)
    for _ in stream:
        pass
    stats = llm.stats
    added = stats.operator_s.get("lora", 0.0) - of_prompt
    return {
        "prefill_s": stats.prefill_s,
        "decode_s": stats.decode_s / work.steps,
        "prefill_lora_s": of_prompt,
        "decode_lora_s": added / work.steps,
    }


def write_adapter(directory: Path, config: ModelConfig, rank: int) -> Path:
    """An adapter of random numbers on every linear layer, as PEFT saves it."""
    generator = torch.Generator().manual_seed(0)
    shapes = stored_shapes(config, stored_tensors(config))
    parts = [part for name in LAYER_GROUPS for part, _ in linear_groups(config)[name].parts]
    ends = {part.rpartition(".")[2] for part in parts} | {"qkv_proj", "gate_up_proj"}
    tensors, targets = {}, set[str]()
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if len(shape) != 2 or module.rpartition(".")[2] not in ends:
            continue
        targets.add(module.rpartition(".")[2])
        for matrix, size, scale in (("A", (rank, shape[1]), shape[1] ** -0.5), ("B", (shape[0], rank), 0.02)):
            numbers = torch.randn(size, generator=generator) * scale
            tensors[f"base_model.model.{module}.lora_{matrix}.weight"] = numbers
    save_file(tensors, directory / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(targets)}
    (directory / "adapter_config.json").write_text(json.dumps(said))
    return directory


if __name__ == "__main__":
    main()
