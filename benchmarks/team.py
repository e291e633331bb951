"""What a team of workers costs, or saves, over one worker: masked decode and prefill over tcp on loopback.

    python -m benchmarks.team [--model synthetic:llama-3.2-1b] [--steps 24] [--rows 1,64,128,256] [--runs 5]

``one``: a worker with all of the model; ``columns``: two with half of the output features each; ``replicas``: two with
all of it. Every worker is a process with one thread. All runs go the plain way, as a team does, with pads ready. They
take turns, and the least of several counts: on a machine that others use the least is what the code takes.
``trusted_s`` is processor time of this side alone. Prefills of several sizes show from which number of rows on a
replica of their own pays.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from benchmarks.machine import RESULTS, add_dirty_ok, check_tree, machine
from tsqp import LLM, ComputeConfig, WorkerConfig
from tsqp.api.config import GuardConfig
from tsqp.api.parties import Channels
from tsqp.api.places import Dial, Dialled, Place, Standing
from tsqp.api.plan import Plan
from tsqp.api.until import Until
from tsqp.bench.pads import fill, pads_of
from tsqp.checkpoint import locate, open_checkpoint
from tsqp.config.shard import Shard
from tsqp.model.batch import Batch
from tsqp.trusted.remote import team

MOST: Final = 1.15  # times one worker: what two halves may take
# Columns of each worker, and its threads.
TEAMS = {
    "one": ([""], 1),
    "both_cores": ([""], 2),
    "columns": (["/0..1of2", "/1..2of2"], 1),
    "replicas": (["", ""], 1),
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="synthetic:llama-3.2-1b")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rows", default="1,64,128,256", help="rows of prefills, which replicas may share")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--teams", default=",".join(TEAMS))
    parser.add_argument("--output", type=Path, default=RESULTS / "team.json")
    add_dirty_ok(parser)
    options = parser.parse_args()
    check_tree(options)
    rows = [int(count) for count in options.rows.split(",")]
    layers = open_checkpoint(locate(options.model)).config.num_layers + 1
    least: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    with ExitStack() as stack:
        runs = {}
        for name in options.teams.split(","):
            columns, threads = TEAMS[name]
            shards = [f"0..{layers}{part}" for part in columns]
            addresses = [stack.enter_context(worker(options.model, shard, threads)) for shard in shards]
            runs[name] = stack.enter_context(team_llm(options.model, addresses, shards))
        for _ in range(options.runs):
            for name, llm in runs.items():
                keep_least(least[name], measured(llm, options.steps, rows))
    for name, figures in least.items():
        print(name, {what: round(seconds * 1e3, 2) for what, seconds in figures.items()}, "ms")
    ratio = least["columns"]["decode_s"] / least["one"]["decode_s"] if {"columns", "one"} <= set(least) else None
    result = {
        "benchmark": "team",
        "model": options.model,
        "steps": options.steps,
        "runs": options.runs,
        "least": least,
        "columns_over_one": ratio,
        "bound": MOST,
        "share_rows": team.SHARE_ROWS,
        "machine": machine(),
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"columns over one, decode: {ratio}; bound {MOST}")


@contextmanager
def worker(model: str, shard: str, threads: int) -> Iterator[str]:
    """A worker process of so many threads: its address."""
    command = [sys.executable, "-P", "-m", "tsqp.untrusted", "--model", locate(model), "--device", "cpu"]
    command += ["--dtype", "field", "--threads", str(threads), "--listen", "tcp://127.0.0.1:0", "--shard", shard]
    command += ["--exit-with-stdin"]  # with this script, however that ends
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield str(json.loads(process.stdout.readline())["address"])
        finally:
            process.terminate()


def team_llm(model: str, addresses: Sequence[str], shards: Sequence[str]) -> LLM:
    """A masked run with these workers, the plain way."""
    guard = GuardConfig(pads_ahead=512, pad_memory=1 << 30, compiled_step=False)
    compute = ComputeConfig(threads=1, prefill_chunk=512, micro_batches=1)

    def places(plan: Plan, model: str, channels: Channels) -> list[Place]:
        return [TeamPlace(channels.to_worker, list(zip(addresses, shards, strict=True)))]

    with patch("tsqp.api.open_model.worker_places", places):
        return LLM(model, worker=WorkerConfig(addresses[0]), guard=guard, compute=compute)


class TeamPlace(Standing):
    """All workers of a run, each with its shard."""

    def __init__(self, dial: Dial, workers: Sequence[tuple[str, str]]) -> None:
        super().__init__("team", dial)
        self._workers = workers

    def dial(self, until: Until) -> Sequence[Dialled]:
        return [Dialled(self._dial(address, None), Shard.parse(shard)) for address, shard in self._workers]


def measured(llm: LLM, steps: int, rows: Sequence[int]) -> dict[str, float]:
    """Seconds of a decode step, and of a prefill of so many rows; this side's processor time of the step."""
    figures = dict[str, float]()
    for count in rows:
        fill(*pads_of(llm))
        cache = llm.engine.decoder.new_cache()
        start = time.perf_counter()
        llm.engine.run(Batch([[7] * count], [cache]))
        figures[f"prefill_{count}_s"] = time.perf_counter() - start
    fill(*pads_of(llm))
    cache = llm.engine.decoder.new_cache()
    llm.engine.run(Batch([[7] * 4], [cache]))
    start, busy = time.perf_counter(), time.process_time()
    for _ in range(steps):
        llm.engine.run(Batch([[7]], [cache]))
    figures["decode_s"] = (time.perf_counter() - start) / steps
    figures["trusted_s"] = (time.process_time() - busy) / steps
    return figures


def keep_least(least: dict[str, float], found: dict[str, float]) -> None:
    for what, seconds in found.items():
        least[what] = min(seconds, least.get(what, seconds))


if __name__ == "__main__":
    main()
