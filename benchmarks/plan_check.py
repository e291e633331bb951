"""What ``tsqp plan`` foretells beside what is measured.

    python -m benchmarks.plan_check [--kept] [--runs 8] [--model synthetic:smollm2-135m] [--workers 1 2 4]

Two parts. ``kept``: each case of ``benchmarks/results/offload.json``, by the constants of the package. With
``--kept`` nothing is measured. ``measured``: steps and prompts, masked and verified, by teams of workers on this
machine: the whole, and everything but the products. The workers share its cores, so a team's products take as long as
one worker's.
Constants are measured first, in the same session, since the speed of a shared machine changes with its neighbours;
``--constants FILE`` takes others. Writes ``benchmarks/results/plan.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from benchmarks.machine import RESULTS, add_dirty_ok, check_tree, machine
from tsqp.api.llm import LLM
from tsqp.bench.constants import bench_constants
from tsqp.bench.tables import new_table
from tsqp.bench.teams import shards_of, team, threads_of
from tsqp.bench.trusted_times import pass_time, private
from tsqp.cores import cores
from tsqp.plan.cluster import Link, Setting, Team
from tsqp.plan.constants import Constants, PrivateMode, load
from tsqp.plan.pads import pad_times
from tsqp.plan.passes import Model, attention_flop, calls_of, in_tee
from tsqp.plan.shapes import shape_of

NEAR = 0.25  # how far a prediction may be from what is measured
PROMPT, CONTEXT = 256, 64
MODES: tuple[PrivateMode, ...] = ("masked", "verified")
Row = dict[str, Any]


def row(name: str, what: str, predicted_s: float, measured_s: float) -> Row:
    """One prediction. ``ratio``: measured over predicted."""
    ratio = measured_s / predicted_s
    found = {"name": name, "what": what, "predicted_s": predicted_s, "measured_s": measured_s}
    return {**found, "ratio": ratio, "near": 1 / (1 + NEAR) <= ratio <= 1 + NEAR}


def kept_rows(constants: Constants, offload: dict[str, Any]) -> Iterator[Row]:
    """Of ``bench offload``, the least of its runs, as constants are the least of theirs."""
    for case in offload["cases"]:
        config = shape_of("smollm2-135m" if case["model"] == "default" else case["model"])
        decodes = case["tokens"] == 1
        setting = Setting(
            config,
            "masked",
            Link(None),
            offload["threads"],
            "cpu",
            batch=case["sequences"],
            prompt=case["context"] if decodes else case["tokens"],
        )
        model = Model(constants, setting, Team())
        parts = model.decode() if decodes else model.prefill()
        least = {name: min(seconds) for name, seconds in case["all_seconds"].items()}
        yield row(case["name"], "masked, the whole", parts.total, least["masked"])
        yield row(case["name"], "masked, the trusted side", parts.trusted, least["trusted"])
        yield row(
            case["name"], "all on the trusted side, int8", _local_s(constants, setting, decodes), least["local_int8"]
        )
        pads = pad_times(constants, setting, 1 if decodes else setting.prompt)
        yield row(case["name"], "pads", case["sequences"] * pads.own, least["pads"])


def _local_s(constants: Constants, setting: Setting, decodes: bool) -> float:
    """What ``in_tee`` says, and what our own ``local`` takes beyond that: calls in Python, torch's attention."""
    trusted = constants.trusted
    seconds = in_tee(constants, setting)[decodes] + calls_of(setting.config) * trusted.alone.call_s
    if not decodes:
        flop = attention_flop(setting.config, setting.prompt)
        seconds += flop * (trusted.alone_flop_s - trusted.flop_s) / setting.cores
    return seconds


def at_work(model: str, of: Team, mode: PrivateMode, console: Console) -> AbstractContextManager[LLM]:
    """A model by a team of workers on this machine, over shm; one alone is asked as ever.

    Workers that compute at once share the cores, sets of layers take turns and have all of them.
    """
    if of.workers == 1:
        return private(model, mode, PROMPT, console)
    shards = shards_of(shape_of(model), of)
    return team(model, shards, mode, "shm", PROMPT, console, threads=threads_of(of.columns))


def measured_rows(constants: Constants, model: str, teams: list[Team], runs: int, console: Console) -> Iterator[Row]:
    """Steps of one and of eight sequences, and a prompt."""
    config = shape_of(model)
    for one in teams:
        for mode in MODES:
            with at_work(model, one, mode, console) as llm:
                for batch, prompt in ((1, CONTEXT), (8, CONTEXT), (0, PROMPT)):
                    setting = Setting(config, mode, Link(None), cores(), "cpu", batch=batch or 1, prompt=prompt)
                    planned = Model(constants, setting, one)
                    parts = planned.decode() if batch else planned.prefill()
                    rows = [1] * batch if batch else [prompt]
                    found = pass_time(llm, rows, CONTEXT if batch else 0, runs * (4 if batch else 1))
                    what = f"{mode}, a step of {batch}" if batch else f"{mode}, a prompt of {prompt}"
                    yield row(str(one), what, parts.trusted + products_s(planned, batch), found.whole)
                    yield row(str(one), f"{what}, but for products", parts.trusted, found.trusted)


def products_s(planned: Model, batch: int) -> float:
    """Seconds of a pass's products where all workers of a team share the cores of this machine; a prompt for batch 0.

    Together they multiply what one worker does. Each is called for itself, as far as there are cores.
    """
    one = replace(planned, team=Team())
    parts = one.decode() if batch else one.prefill()
    turns = max(1.0, planned.team.columns / planned.setting.cores)
    return turns * parts.launches + parts.reading + parts.multiplying


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", action="store_true", help="nothing is measured")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--model", default="synthetic:llama-3.2-1b-4-layers")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--constants", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS / "plan.json")
    add_dirty_ok(parser)
    options = parser.parse_args()
    check_tree(options)
    console, packaged = Console(), load()
    offload = json.loads((RESULTS / "offload.json").read_text(encoding="utf-8"))
    kept, measured, constants = list(kept_rows(packaged, offload)), [], packaged
    if not options.kept:
        if options.constants is None:
            constants = msgspec.convert(bench_constants(options.runs, console), Constants)
        else:
            constants = load(options.constants)
        teams = [Team(columns=count) for count in options.workers]
        teams += [Team(layers=2)] if max(options.workers) > 1 else []
        measured = list(measured_rows(constants, options.model, teams, options.runs, console))
    for title, rows in (("kept results", kept), (options.model, measured)):
        table = new_table(f"foretold and measured: {title}", ("foretold, ms", "measured, ms", "ratio"))
        for one in rows:
            times = (f"{one[key] * 1e3:.4g}" for key in ("predicted_s", "measured_s"))
            table.add_row(f"{one['name']}: {one['what']}", *times, f"{one['ratio']:.2f}{'' if one['near'] else ' !'}")
        console.print(table)
    result = {
        "benchmark": "plan",
        "model": options.model,
        "calls": calls_of(shape_of(options.model)),
        "runs": options.runs,
        "kept": kept,
        "measured": measured,
        "constants": msgspec.to_builtins(constants),
        "machine": machine(),
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
