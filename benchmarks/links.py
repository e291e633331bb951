"""What distance, loss and a slow line cost a masked run, beside what ``tsqp plan`` foretells.

    python -m benchmarks.links [--model synthetic:smollm2-135m] [--runs 3] [--constants FILE]

The worker runs in a network namespace of its own, over tcp with keys; the line between has a delay, loses packets or
has a rate (``benchmarks/networks.py``). Needs root, iproute2 and /dev/net/tun. Steps of one and of eight sequences and
a prompt, pads ready; the least of the runs, the mean where packets are lost. Writes ``benchmarks/results/links.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.machine import RESULTS, add_dirty_ok, check_tree, machine
from benchmarks.networks import Condition, network, why_not
from tsqp.api.config import RunConfig
from tsqp.api.llm import LLM
from tsqp.bench.keyed_worker import keyed_worker
from tsqp.bench.offload import filled
from tsqp.bench.opened import opened
from tsqp.bench.pads import ready_for, with_pads
from tsqp.bench.tables import new_table
from tsqp.checkpoint import locate
from tsqp.cores import cores
from tsqp.model.batch import Batch
from tsqp.plan.cluster import Link, Setting, Team
from tsqp.plan.constants import Constants, load
from tsqp.plan.passes import Model
from tsqp.plan.shapes import shape_of

GBIT = 1e9 / 8
FAST = 1e12  # bytes a second, of a line without a rate
CONDITIONS = (
    Condition("as fast as it goes"),
    Condition("5 ms", rtt_s=0.005),
    Condition("50 ms", rtt_s=0.05),
    Condition("1 Gbit/s", rate=GBIT),
    Condition("1 Gbit/s, 5 ms", rtt_s=0.005, rate=GBIT),
    Condition("1 % loss", loss=0.01),
    Condition("5 ms, 1 % loss", rtt_s=0.005, loss=0.01),
)
PROMPT, CONTEXT, STREAMS = 64, 64, (1, 8)


def times(llm: LLM, rows: list[int], context: int, runs: int) -> list[float]:
    """Seconds of each pass, after one that does not count; pads are ready."""
    found = []
    for _ in range(runs + 1):
        caches = [filled(llm.engine.decoder.new_cache(), llm.config, context) for _ in rows]
        ready_for(llm, sum(rows), len(rows))
        start = time.perf_counter()
        llm.engine.run(Batch([[7] * count for count in rows], caches))
        found.append(time.perf_counter() - start)
    return found[1:]


def predicted_s(constants: Constants, model: str, condition: Condition, streams: int) -> float:
    """Seconds of a step of so many sequences, or of the prompt for 0."""
    link = Link(condition.rate or FAST, condition.rtt_s, loss=condition.loss)
    prompt = CONTEXT if streams else PROMPT
    setting = Setting(shape_of(model), "masked", link, cores(), "cpu", batch=streams or 1, prompt=prompt)
    planned = Model(constants, setting, Team())
    return planned.decode().total if streams else planned.prefill().total


def measured(
    condition: Condition, model: str, runs: int, constants: Constants, console: Console
) -> Iterator[dict[str, Any]]:
    """Of one line: steps, and a prompt."""
    run = with_pads(RunConfig(model, "masked"), 2 * PROMPT)
    with ExitStack() as stack:
        keys = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tsqp-links-")))
        net = stack.enter_context(network(condition))
        worker = keyed_worker(locate(model), keys, host=net.host, inside=net.inside)
        llm = stack.enter_context(opened(stack.enter_context(worker).of(run), console))
        for batch in (*STREAMS, 0):
            rows = [1] * batch if batch else [PROMPT]
            seconds = times(llm, rows, CONTEXT if batch else 0, runs)
            found = statistics.mean(seconds) if condition.loss else min(seconds)
            foretold = predicted_s(constants, model, condition, batch)
            yield {
                "condition": condition.name,
                "what": f"{batch} streams" if batch else f"a prompt of {PROMPT}",
                "streams": batch,
                "tokens_per_s": sum(rows) / found,
                "predicted_tokens_per_s": sum(rows) / foretold,
                "all_seconds": seconds,
            }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="synthetic:smollm2-135m")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--constants", type=Path)
    parser.add_argument("--only", nargs="+", choices=[one.name for one in CONDITIONS])
    parser.add_argument("--output", type=Path, default=RESULTS / "links.json")
    add_dirty_ok(parser)
    options = parser.parse_args()
    check_tree(options)
    if (missing := why_not()) is not None:
        raise SystemExit(missing)
    console, load_before = Console(), os.getloadavg()[0]
    rows: list[dict[str, Any]] = []
    constants = load(options.constants)
    for condition in CONDITIONS:
        if options.only is None or condition.name in options.only:
            rows += measured(condition, options.model, options.runs, constants, console)
    table = new_table("tokens a second, masked, over tcp with keys", ("measured", "foretold"))
    for one in rows:
        rates = (f"{one[key]:.3g}" for key in ("tokens_per_s", "predicted_tokens_per_s"))
        table.add_row(f"{one['condition']}: {one['what']}", *rates)
    console.print(table)
    result = {
        "benchmark": "links",
        "model": options.model,
        "runs": options.runs,
        "rows": rows,
        "load_before": load_before,
        "machine": machine(),
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
