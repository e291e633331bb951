"""``bench prefill`` and ``bench decode``: what the split costs, against the same model unsplit, in alternation."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from tsqp.app.bench.ceilings import ceilings, higher, model_limits, print_ceilings
from tsqp.app.bench.machine import cores, machine
from tsqp.app.bench.options import PeerName, benchmarked
from tsqp.app.bench.peer import Ours, Peer, TransformersPeer, choose_peer
from tsqp.app.bench.progress import watched
from tsqp.app.cli import open_llm
from tsqp.app.llm import LLM
from tsqp.app.options import RunOptions
from tsqp.app.report import announce
from tsqp.app.trace import communication_share, write_trace
from tsqp.checkpoint import locate
from tsqp.errors import OptionError
from tsqp.model.payload import TORCH_DTYPES
from tsqp.spec.dtype import float_dtype
from tsqp.trusted.stats import Stats
from tsqp.trusted.trace import Trace

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Workload:
    """A prompt of ``tokens``, then ``steps`` decode steps; ``runs`` times for each side."""

    tokens: int
    steps: int
    runs: int

    def check(self) -> None:
        """Raises OptionError."""
        for name, value, least in (("tokens", self.tokens, 1), ("steps", self.steps, 0), ("runs", self.runs, 1)):
            if value < least:
                raise OptionError(f"--{name} must be at least {least}, not {value}")

    def prompt(self) -> list[int]:
        """Token ids below 256, which every vocabulary has; the same ones each time."""
        return torch.randint(0, 256, (self.tokens,), generator=torch.Generator().manual_seed(0)).tolist()


@dataclass
class Measured:
    """Seconds of every run: of prefill, and of one decode step."""

    prefill: list[float]
    decode: list[float]
    prefill_share: list[float]
    decode_share: list[float]

    @classmethod
    def empty(cls) -> Measured:
        return cls([], [], [], [])

    def add(self, prefill_s: float, decode_s: float, steps: int) -> None:
        self.prefill.append(prefill_s)
        if steps:
            self.decode.append(decode_s / steps)

    def add_shares(self, trace: Trace) -> None:
        """How much of the time was communication."""
        for passes, shares in (("prefill", self.prefill_share), ("decode", self.decode_share)):
            share = communication_share(trace, passes)
            if share is not None:
                shares.append(share)


def bench_split(
    run: RunOptions, work: Workload, peer_name: PeerName | None, trace_file: Path | None, console: Console
) -> dict[Phase, dict[str, Any]]:
    """Both phases, decode only where the workload has steps. Raises OptionError and every error of ``LLM``."""
    work.check()
    run = replace(run, dtype=benchmarked(run.dtype))
    peer_name = choose_peer(peer_name)
    threads = run.threads or cores()
    rates = ceilings(run.dtype, run.device if run.worker is None else "cpu", threads)
    print_ceilings(rates, console)
    with ExitStack() as stack:
        llm = stack.enter_context(open_llm(run))
        announce(llm, console)
        peer = _open_peer(peer_name, run, str(rates["device"]), stack)
        ours, theirs = Measured.empty(), Measured.empty()
        prompt = work.prompt()
        for warm in watched(range(-1, work.runs), console, f"{run.model}"):
            trace = llm.stats.trace = Trace()
            seconds = Ours(llm).run(prompt, work.steps)
            if peer is not None:
                peer_seconds = peer.run(prompt, work.steps)
                if warm >= 0:
                    theirs.add(*peer_seconds, work.steps)
            if warm >= 0:
                ours.add(*seconds, work.steps)
                ours.add_shares(trace)
        if trace_file is not None:
            write_trace(trace, trace_file)
        rates = higher(rates, ceilings(run.dtype, str(rates["device"]), threads))
        limit = model_limits(locate(run.model), work.tokens, rates)
        about = {**_about(run, llm, work), "peer_name": None if peer is None else peer.name}
    return {
        phase: _result(phase, about, ours, theirs, limit[phase], rates)
        for phase in ("prefill", "decode")
        if phase == "prefill" or work.steps
    }


def _open_peer(name: PeerName, run: RunOptions, device: str, stack: ExitStack) -> Peer | None:
    """What the run is compared with; what it needs is closed with ``stack``."""
    if name == "none":
        return None
    if name == "ours":
        plain = replace(run, worker=None, partition="linear", dtype="bfloat16", wire_dtype=None, compile=False)
        return Ours(stack.enter_context(open_llm(plain)))
    return TransformersPeer(locate(run.model), TORCH_DTYPES[float_dtype(benchmarked(run.dtype))], device)


def _about(run: RunOptions, llm: LLM, work: Workload) -> dict[str, Any]:
    """What was run, as it really was."""
    plan, session = llm.plan, llm.session
    return {
        "model": run.model,
        "protection": plan.protection.name,
        "partition": None if plan.partition is None else plan.partition.name,
        "transport": None if session is None else session.channel.transport,
        "device": "cpu" if session is None else session.welcome.device,
        "dtype": plan.worker_dtype,
        "wire_dtype": None if session is None else plan.wire_dtype,
        "threads": run.threads or cores(),
        "tokens": work.tokens,
        "decode_steps": work.steps,
        "runs": work.runs,
        "traffic_of_last_run": _traffic(llm.stats),
    }


def _traffic(stats: Stats) -> dict[str, int]:
    """Calls and bytes of one prefill with its decode steps."""
    counted = stats.as_dict()
    names = ("rpc_calls", "bytes_sent", "bytes_received", "forward_passes", "chunks", "micro_batches")
    return {name: int(counted[name]) for name in names}  # type: ignore[call-overload]


def _result(
    phase: Phase, about: dict[str, Any], ours: Measured, theirs: Measured, limit_s: float, rates: dict[str, Any]
) -> dict[str, Any]:
    """The JSON object of one phase; all times in seconds, of decode for one token."""
    samples, peer_samples = getattr(ours, phase), getattr(theirs, phase)
    shares = getattr(ours, f"{phase}_share")
    seconds = statistics.median(samples)
    about = dict(about)
    peer_name = about.pop("peer_name")
    peer_s = statistics.median(peer_samples) if peer_samples else None
    return {
        "benchmark": phase,
        **about,
        "seconds": seconds,
        "peer": None if peer_s is None else {"name": peer_name, "seconds": peer_s},
        "ratio": None if peer_s is None else seconds / peer_s,
        "limit_seconds": limit_s,
        "communication_share": statistics.median(shares) if shares else None,
        "all_seconds": {"ours": samples, "peer": peer_samples},
        "ceilings": rates,
        "machine": machine(),
    }
