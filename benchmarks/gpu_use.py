"""``python -m benchmarks.gpu_use``: how busy the GPU is while ``open`` prefills at partition ``layer``.

Prompts follow each other for some seconds, and ``nvidia-smi`` says meanwhile for which share of the time a kernel was
running. A driver counts no more than that: a kernel on one processor counts as much as one on all. What the trusted
side does between two prompts counts as time. Prints one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu_device import described
from tsqp import LLM, ComputeConfig, WorkerConfig
from tsqp.bench.peer import Ours
from tsqp.bench.workload import Workload
from tsqp.errors import ChannelError

SMI = ("nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=100")
SECONDS = 5.0
PERIOD_S = 1.0  # drivers count over 1/6 of a second to a second: an earlier sample may be of the time before
LEAST = 5  # samples
FIRST_WORD_S = 5.0  # one that holds back what it says would be waited for until the part is ended


class NotTold(RuntimeError):
    """Nothing says how busy the GPU is."""


@dataclass(frozen=True)
class Use:
    """``shares`` of the time in which the GPU was busy, one of each sample; ``runs`` seconds of each run meanwhile."""

    shares: list[float]
    runs: list[float]


def use_during(
    work: Callable[[], float], command: Sequence[str], seconds: float = SECONDS, period_s: float = PERIOD_S
) -> Use:
    """Runs ``work``, which says how long it took, over and over, and reads what ``command`` says a line each.

    Raises NotTold where it says nothing, or too little.
    """
    lines: list[tuple[float, str]] = []
    first = threading.Event()

    def read() -> None:
        for line in process.stdout or ():
            lines.append((time.monotonic(), line))
            first.set()
        first.set()

    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError as error:
        raise NotTold(f"{command[0]} cannot be started: {error.strerror}") from error
    reader = threading.Thread(target=read, daemon=True)
    with process:
        reader.start()
        try:
            if not first.wait(FIRST_WORD_S):
                raise NotTold(f"{command[0]} has said nothing in {FIRST_WORD_S:.0f} s")
            runs, begun = list[float](), time.monotonic()
            while not runs or time.monotonic() < begun + seconds:
                runs.append(work())
            ended = time.monotonic()
        finally:
            process.kill()
            reader.join()
    shares = shares_between(lines, begun + period_s, ended)
    if len(shares) < LEAST:
        raise NotTold(f"{command[0]} has said {len(shares)} times how busy the GPU is, at least {LEAST} are needed")
    return Use(shares, runs)


def shares_between(lines: Sequence[tuple[float, str]], begin: float, end: float) -> list[float]:
    """Percent as shares, of lines that came in between; what is no number is no sample."""
    return [int(line) / 100 for moment, line in lines if begin <= moment <= end and line.strip().isdecimal()]


def measured(llm: LLM, tokens: int, command: Sequence[str]) -> dict[str, object]:
    """The use of a model that is open, by prompts of so many tokens. Raises NotTold."""
    prompt, ours = Workload(tokens, 0, 1).prompt(), Ours(llm)
    ours.run(prompt, 0)  # libraries set themselves up
    found = use_during(lambda: ours.run(prompt, 0)[0], command)
    return {
        "tokens": tokens,
        "gpu_use": statistics.median(found.shares),
        "prefill_s": statistics.median(found.runs),
        "all_shares": found.shares,
        "all_prefill_s": found.runs,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_use")
    parser.add_argument("--model", default="synthetic:llama-3.2-1b")
    parser.add_argument("--tokens", type=int, default=[4096, 1024], nargs="+", help="of a prompt, one after the other")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-use: there is no CUDA device here", file=sys.stderr)
        return 1
    device = torch.device("cuda", 0)
    uuid = torch.cuda.get_device_properties(device).uuid  # numbers of nvidia-smi need not be those of CUDA
    compute = ComputeConfig(partition="layer", dtype="bfloat16")
    try:
        with LLM(options.model, protection="open", worker=WorkerConfig(device=str(device)), compute=compute) as llm:
            found = [measured(llm, tokens, (*SMI, f"--id=GPU-{uuid}")) for tokens in options.tokens]
    except (NotTold, ChannelError) as error:
        print(f"gpu-use: {error}", file=sys.stderr)
        return 1
    about = {"benchmark": "gpu-use", "model": options.model, "protection": "open", "partition": "layer"}
    print(json.dumps({**about, "prompts": found, "gpu": described(device)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
