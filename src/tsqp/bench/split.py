"""``bench prefill`` and ``bench decode``: what the split costs, against the same model unsplit, in alternation."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from tsqp.api.config import RunConfig
from tsqp.api.llm import LLM
from tsqp.api.trace_file import communication_share, write_trace
from tsqp.bench.ceilings import ceilings, higher, model_limits, print_ceilings
from tsqp.bench.device import check_device, first_device
from tsqp.bench.llama_cpp import LlamaCppPeer
from tsqp.bench.machine import machine
from tsqp.bench.names import PeerName, benchmarked
from tsqp.bench.opened import in_bfloat16, opened, plain
from tsqp.bench.pads import PadsDrained, PadsReady, pads_of, with_pads
from tsqp.bench.peer import Ours, Peer, TransformersPeer, choose_peer
from tsqp.bench.progress import watched
from tsqp.bench.workload import Measured, Workload
from tsqp.checkpoint import locate
from tsqp.config.dtype import PlainDtype, float_dtype
from tsqp.config.protection import PROTECTIONS, Protection
from tsqp.cores import cores
from tsqp.trusted.stats import Stats
from tsqp.trusted.trace import Trace

Phase = Literal["prefill", "decode"]


def bench_split(
    run: RunConfig, work: Workload, peer_name: PeerName | None, trace_file: Path | None, console: Console
) -> dict[Phase, dict[str, Any]]:
    """Both phases, decode only where the workload has steps. Raises OptionError and every error of ``LLM``."""
    work.check()
    protection = PROTECTIONS[run.protection]
    if not protection.checked:  # a private mode has numbers of its own
        run = replace(run, compute=replace(run.compute, dtype=benchmarked(run.compute.dtype)))
    run = with_pads(run, work.tokens + work.steps)
    peer_name = choose_peer(peer_name, console)
    threads = run.compute.threads or cores()
    computed = _computed(run)
    device = run.worker.device if protection.uses_worker and run.worker.address is None else "cpu"
    check_device(device)
    rates = ceilings(computed, first_device(device), threads)
    print_ceilings(rates, console)
    with ExitStack() as stack:
        llm = stack.enter_context(opened(run, console))
        peer = _open_peer(peer_name, run, work, str(rates["device"]), stack, console)
        mode: Peer = PadsReady(llm) if protection.masked else Ours(llm)
        drained = PadsDrained(llm) if protection.masked else None
        ours, theirs, without_pads = Measured.empty(), Measured.empty(), Measured.empty()
        prompt = work.prompt()
        for warm in watched(range(-1, work.runs), console, f"{run.model}"):
            seconds = mode.run(prompt, work.steps)
            if drained is not None:
                drained_seconds = drained.run(prompt, work.steps)
                if warm >= 0:
                    without_pads.add(*drained_seconds, work.steps)
            if peer is not None:
                peer_seconds = peer.run(prompt, work.steps)
                if warm >= 0:
                    theirs.add(*peer_seconds, work.steps)
            if warm >= 0:
                ours.add(*seconds, work.steps)
        trace = llm.stats.trace = Trace()  # one more, since with a trace there are no compiled steps
        mode.run(prompt, work.steps)
        llm.stats.trace = None
        if trace_file is not None:
            write_trace(trace, trace_file)
        rates = higher(rates, ceilings(computed, str(rates["device"]), threads))
        limit = model_limits(locate(run.model), work.tokens, rates)
        limit["prefill"] *= _products(protection)
        about = {**_about(run, llm, work), "peer_name": None if peer is None else peer.name}
    return {
        phase: _result(phase, about, ours, theirs, without_pads, communication_share(trace, phase), limit[phase], rates)
        for phase in ("prefill", "decode")
        if phase == "prefill" or work.steps
    }


def _open_peer(
    name: PeerName, run: RunConfig, work: Workload, device: str, stack: ExitStack, console: Console
) -> Peer | None:
    """What the run is compared with; what it needs is closed with ``stack``."""
    threads = run.compute.threads or cores()
    match name:
        case "none":
            return None
        case "ours":
            return Ours(stack.enter_context(opened(in_bfloat16(plain(run)), console)))
        case "llama.cpp":
            return stack.enter_context(LlamaCppPeer(locate(run.model), _computed(run), work, threads, console))
        case "transformers":
            dtype = float_dtype(benchmarked(run.compute.dtype))
            return stack.enter_context(TransformersPeer(locate(run.model), dtype, device, threads))


def _computed(run: RunConfig) -> PlainDtype:
    """What products are made in; those of the private modes are of 8-bit numbers."""
    return "int8" if PROTECTIONS[run.protection].checked else benchmarked(run.compute.dtype)


def _products(protection: Protection) -> int:
    """Products of 8-bit digits for one product: four in ``masked``, two in ``verified``. Weights are read once."""
    if not protection.checked:
        return 1
    return 4 if protection.masked else 2


def _about(run: RunConfig, llm: LLM, work: Workload) -> dict[str, Any]:
    """What was run, as it really was."""
    plan, session = llm.plan, llm.session
    return {
        "model": run.model,
        "protection": plan.protection.name,
        "partition": None if plan.partition is None else plan.partition.name,
        "transport": None if session is None else session.transport,
        "device": "cpu" if session is None else session.welcome.device,
        "dtype": plan.linear_dtype,
        "wire_dtype": plan.crossing,
        "threads": run.compute.threads or cores(),
        "tokens": work.tokens,
        "decode_steps": work.steps,
        "runs": work.runs,
        "traffic_of_last_run": _traffic(llm.stats),
        **({"pads": _pads(run, llm)} if plan.protection.masked else {}),
    }


def _pads(run: RunConfig, llm: LLM) -> dict[str, Any]:
    """Who made the pads, and for how many tokens they were kept ready."""
    source = "tee" if llm.dealer is None else "dealer"
    return {"source": source, "ahead": pads_of(llm)[1].ahead, "memory_bytes": run.guard.pad_memory}


def _traffic(stats: Stats) -> dict[str, int]:
    """Calls and bytes of one prefill with its decode steps."""
    counted = stats.as_dict()
    names = ("rpc_calls", "bytes_sent", "bytes_received", "forward_passes", "chunks", "micro_batches")
    return {name: int(counted[name]) for name in names}  # type: ignore[call-overload]


def _result(
    phase: Phase,
    about: dict[str, Any],
    ours: Measured,
    theirs: Measured,
    without_pads: Measured,
    share: float | None,
    limit_s: float,
    rates: dict[str, Any],
) -> dict[str, Any]:
    """The JSON object of one phase; all times in seconds, of decode for one token. ``share``: of communication."""
    drained = getattr(without_pads, phase)
    samples, peer_samples = getattr(ours, phase), getattr(theirs, phase)
    seconds = statistics.median(samples)
    about = dict(about)
    peer_name = about.pop("peer_name")
    peer_s = statistics.median(peer_samples) if peer_samples else None
    return {
        "benchmark": phase,
        **about,
        "seconds": seconds,
        **({"seconds_drained": statistics.median(drained)} if drained else {}),
        "peer": None if peer_s is None else {"name": peer_name, "seconds": peer_s},
        "ratio": None if peer_s is None else seconds / peer_s,
        **({"ratio_drained": statistics.median(drained) / peer_s} if drained and peer_s is not None else {}),
        "limit_seconds": limit_s,
        "communication_share": share,
        "all_seconds": {"ours": samples, "peer": peer_samples, **({"drained": drained} if drained else {})},
        "ceilings": rates,
        "machine": machine(),
    }
