"""``bench private``: what the guard costs. Every mode in alternation, beside our own ``open`` in bfloat16."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from rich.console import Console

from tsqp.api.config import DEALER, GuardConfig, RunConfig, WorkerConfig
from tsqp.api.llm import LLM
from tsqp.bench.ceilings import ceilings, higher, print_ceilings
from tsqp.bench.device import check_device, first_device
from tsqp.bench.machine import machine
from tsqp.bench.opened import in_bfloat16, opened, plain
from tsqp.bench.pads import PadsDrained, PadsReady, with_pads
from tsqp.bench.peer import Ours, Peer
from tsqp.bench.progress import watched
from tsqp.bench.workload import Measured, Workload
from tsqp.checkpoint import locate
from tsqp.cores import cores
from tsqp.errors import OptionError
from tsqp.launch.local import LocalWorker

MODES = {  # what each key of the result's ``modes`` is
    "open": "open, bfloat16",
    "verified": "verified",
    "masked": "masked, pads ready",
    "masked_drained": "masked, pads drained",
    "masked_dealer": "masked, pads by a dealer",
}


def bench_private(run: RunConfig, work: Workload, console: Console, only: Sequence[str] = ()) -> dict[str, Any]:
    """Every mode, or ``open`` and those in ``only``, over shm with workers of its own on ``run.worker.device``.

    Raises OptionError and every error of ``LLM``.
    """
    work.check()
    unknown = sorted(set(only) - set(MODES))
    if unknown:
        raise OptionError(f"unknown mode '{unknown[0]}': use {', '.join(MODES)}")
    wanted = set(only) | {"open"} if only else set(MODES)
    threads = run.compute.threads or cores()
    check_device(run.worker.device)
    device = first_device(run.worker.device)
    rates = ceilings("bfloat16", device, threads)
    print_ceilings(rates, console)
    with ExitStack() as stack:
        modes = _open_modes(run, work, wanted, stack, console)
        found = {name: Measured.empty() for name in modes}
        prompt = work.prompt()
        for warm in watched(range(-1, work.runs), console, run.model):
            for name, mode in modes.items():
                seconds = mode.run(prompt, work.steps)
                if warm >= 0:
                    found[name].add(*seconds, work.steps)
        rates = higher(rates, ceilings("bfloat16", device, threads))
    rows = {name: _row(name, measured, found["open"]) for name, measured in found.items()}
    shown = rows.get("masked", rows[next(reversed(rows))])
    return {
        "benchmark": "private",
        "model": run.model,
        "partition": "linear",
        "transport": "shm",
        "device": run.worker.device,
        "threads": threads,
        "micro_batches": run.compute.micro_batches,  # None: as the first prompts have shown to be fastest
        "tokens": work.tokens,
        "decode_steps": work.steps,
        "runs": work.runs,
        "seconds": shown["prefill_s"],
        "seconds_drained": rows["masked_drained"]["prefill_s"] if "masked_drained" in rows else None,
        "peer": {"name": "TSQP open linear, bfloat16", "seconds": rows["open"]["prefill_s"]},
        "ratio": shown["prefill_ratio"],
        "modes": rows,
        "pads": {"ahead": work.tokens + work.steps, "checks": run.guard.checks},
        "ceilings": rates,
        "machine": machine(),
    }


def _open_modes(
    run: RunConfig, work: Workload, wanted: Collection[str], stack: ExitStack, console: Console
) -> dict[str, Peer]:
    """What takes turns, by name. One worker serves every private mode, another deals."""

    def field_worker() -> str:
        threads = run.compute.threads or cores()
        started = LocalWorker(locate(run.model), device=run.worker.device, dtype="field", threads=threads)
        return stack.enter_context(started).wait_ready()

    def model(options: RunConfig) -> LLM:
        return stack.enter_context(opened(options, console))

    bare = plain(run)
    bare = replace(bare, compute=replace(bare.compute, micro_batches=run.compute.micro_batches))
    modes: dict[str, Peer] = {"open": Ours(model(in_bfloat16(bare)))}
    if wanted == {"open"}:
        return modes
    guard, worker = GuardConfig(checks=run.guard.checks), WorkerConfig(field_worker())
    verified = in_bfloat16(replace(bare, protection="verified", worker=worker, guard=guard))
    masked = with_pads(replace(verified, protection="masked"), work.tokens + work.steps)
    if "verified" in wanted:
        modes["verified"] = Ours(model(verified))
    if {"masked", "masked_drained"} & set(wanted):
        with_tee = model(masked)
        both: dict[str, Peer] = {"masked": PadsReady(with_tee), "masked_drained": PadsDrained(with_tee)}
        modes |= {name: peer for name, peer in both.items() if name in wanted}
    if "masked_dealer" in wanted:
        source = f"{DEALER}{field_worker()}"
        dealt = GuardConfig(run.guard.checks, pad_source=source, dealer_no_separation=True, pads_ahead=0)
        modes["masked_dealer"] = Ours(model(replace(masked, guard=dealt)))
    return modes


def _row(name: str, measured: Measured, peer: Measured) -> dict[str, Any]:
    """One mode: medians of both phases, in seconds, of decode for one token, and their ratios to ``open``."""
    row: dict[str, Any] = {"name": MODES[name]}
    for phase in ("prefill", "decode"):
        samples, theirs = getattr(measured, phase), getattr(peer, phase)
        if samples:
            seconds = statistics.median(samples)
            row |= {f"{phase}_s": seconds, f"{phase}_ratio": seconds / statistics.median(theirs)}
            row[f"all_{phase}_s"] = samples
    return row
