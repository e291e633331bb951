"""What the trusted process holds at `linear`: its peak resident memory beyond the embedding table.

    python -m benchmarks.memory [--model synthetic:llama-3.2-1b] [--tokens 1024]

Resident memory counts everything that is mapped and touched: the interpreter, torch's libraries, the KV cache, the
residual stream, and the arena that is shared with the worker. Several processes would be needed for a median; the
figure moves by a few megabytes from run to run.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: the worker uses the same cores

import torch

from benchmarks.machine import RESULTS, add_dirty_ok, check_tree, machine
from tsqp import LLM, ComputeConfig, SamplingParams
from tsqp.checkpoint import open_checkpoint
from tsqp.cores import cores


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="synthetic:llama-3.2-1b")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=RESULTS / "memory.json")
    add_dirty_ok(parser)
    options = parser.parse_args()
    check_tree(options)
    config = open_checkpoint(options.model).config
    prompt = torch.randint(0, 256, (options.tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    threads = cores()
    with LLM(options.model, protection="open", compute=ComputeConfig(dtype="bfloat16", threads=threads)) as llm:
        llm.generate(prompt, SamplingParams(max_tokens=9, ignore_eos=True))
    embedding = config.vocab_size * config.hidden_size * 2
    peak = peak_resident_bytes()
    result = {
        "benchmark": "memory",
        "model": options.model,
        "partition": "linear",
        "tokens": options.tokens,
        "dtype": "bfloat16",
        "peak_resident_bytes": peak,
        "embedding_bytes": embedding,
        "beyond_embedding_bytes": peak - embedding,
        "machine": machine(),
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{peak / 1e9:.2f} GB at its peak, {(peak - embedding) / 1e9:.2f} GB beyond the embedding; {options.output}")


def peak_resident_bytes() -> int:
    """VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
