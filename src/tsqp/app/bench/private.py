"""``bench private``: what the guard costs. Every mode in alternation, beside our own ``open`` in bfloat16."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from rich.console import Console

from tsqp.app.bench.ceilings import ceilings, higher, print_ceilings
from tsqp.app.bench.machine import cores, machine
from tsqp.app.bench.pads import PadsDrained, PadsReady, pads_of, with_pads
from tsqp.app.bench.peer import Ours, Peer
from tsqp.app.bench.progress import watched
from tsqp.app.bench.workload import Measured, Workload
from tsqp.app.guard_options import GuardOptions
from tsqp.app.launch import LocalWorker
from tsqp.app.open import open_llm
from tsqp.app.options import RunOptions
from tsqp.app.report import announce
from tsqp.checkpoint import locate

MODES = {  # what each key of the result's ``modes`` is
    "open": "open, bfloat16",
    "verified": "verified",
    "masked": "masked, pads ready",
    "masked_drained": "masked, pads drained",
    "masked_dealer": "masked, pads by a dealer",
}


def bench_private(run: RunOptions, work: Workload, console: Console) -> dict[str, Any]:
    """Every mode over shm with workers of its own on ``run.device``. Raises OptionError and every error of ``LLM``."""
    work.check()
    threads = run.threads or cores()
    rates = ceilings("bfloat16", run.device, threads)
    print_ceilings(rates, console)
    with ExitStack() as stack:
        modes, pads = _open_modes(run, work, stack, console)
        found = {name: Measured.empty() for name in modes}
        prompt = work.prompt()
        for warm in watched(range(-1, work.runs), console, run.model):
            for name, mode in modes.items():
                seconds = mode.run(prompt, work.steps)
                if warm >= 0:
                    found[name].add(*seconds, work.steps)
        rates = higher(rates, ceilings("bfloat16", run.device, threads))
    rows = {name: _row(name, measured, found["open"]) for name, measured in found.items()}
    return {
        "benchmark": "private",
        "model": run.model,
        "partition": "linear",
        "transport": "shm",
        "device": run.device,
        "threads": threads,
        "tokens": work.tokens,
        "decode_steps": work.steps,
        "runs": work.runs,
        "seconds": rows["masked"]["prefill_s"],
        "seconds_drained": rows["masked_drained"]["prefill_s"],
        "peer": {"name": "TSQP open linear, bfloat16", "seconds": rows["open"]["prefill_s"]},
        "ratio": rows["masked"]["prefill_ratio"],
        "modes": rows,
        "pads": pads,
        "ceilings": rates,
        "machine": machine(),
    }


def _open_modes(
    run: RunOptions, work: Workload, stack: ExitStack, console: Console
) -> tuple[dict[str, Peer], dict[str, Any]]:
    """What takes turns, by name, and how the pads were kept. One worker serves every private mode, another deals."""
    plain = replace(run, worker=None, partition="linear", dtype="auto", wire_dtype=None, compile=False)

    def field_worker() -> str:
        started = LocalWorker(locate(run.model), device=run.device, dtype="field", threads=run.threads or cores())
        return stack.enter_context(started).wait_ready()

    def opened(options: RunOptions) -> Any:
        llm = stack.enter_context(open_llm(options))
        announce(llm, console)
        return llm

    bare = opened(replace(plain, protection="open", dtype="bfloat16", guard=GuardOptions()))
    worker = field_worker()
    verified = replace(plain, protection="verified", worker=worker, guard=GuardOptions(checks=run.guard.checks))
    masked = with_pads(replace(verified, protection="masked"), work.tokens + work.steps)
    dealt = GuardOptions(
        run.guard.checks, pad_source=f"dealer={field_worker()}", dealer_no_separation=True, pads_ahead=0
    )
    modes: dict[str, Peer] = {"open": Ours(bare), "verified": Ours(opened(verified))}
    with_tee = opened(masked)
    modes |= {"masked": PadsReady(with_tee), "masked_drained": PadsDrained(with_tee)}
    modes["masked_dealer"] = Ours(opened(replace(masked, guard=dealt)))
    pads = {"ahead": pads_of(with_tee)[1].ahead, "memory_bytes": masked.guard.pad_memory, "checks": run.guard.checks}
    return modes, pads


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
