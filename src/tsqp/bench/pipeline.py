"""``bench pipeline``: how much of the worker's time micro-batches hide.

Where both sides share the cores, overlap cannot be seen: two computations share one processor. So here the worker
waits for a given time per call instead of computing (``waiting``). The peer makes the same calls, with the same rows
and the same waits, one after the other: N chunks in place of N micro-batches.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from tsqp.api.config import ComputeConfig
from tsqp.api.llm import LLM
from tsqp.bench.ceilings import ceilings, print_ceilings
from tsqp.bench.child import Child
from tsqp.bench.machine import machine
from tsqp.bench.names import TransportName
from tsqp.bench.progress import watched
from tsqp.bench.rpc import fresh_address
from tsqp.bench.workload import Workload
from tsqp.checkpoint import locate
from tsqp.config.dtype import PlainDtype
from tsqp.cores import cores
from tsqp.errors import OptionError
from tsqp.trusted.engine.sampling_params import SamplingParams

MODULE = "tsqp.bench.waiting"


@dataclass(frozen=True)
class PipelineSetup:
    """What runs. ``worker_ms`` None takes the trusted side's own time per call, so that both sides have equal work."""

    model: str
    transport: TransportName
    dtype: PlainDtype
    micro_batches: int
    worker_ms: float | None
    threads: int | None

    def check(self, tokens: int) -> None:
        """Raises OptionError."""
        if self.transport in ("mem", "cuda"):
            raise OptionError("bench pipeline has a worker process of its own, without a GPU: use ipc, tcp or shm")
        if not 2 <= self.micro_batches <= tokens:
            raise OptionError(f"--micro-batches must be between 2 and --tokens, not {self.micro_batches}")
        if self.worker_ms is not None and self.worker_ms <= 0:
            raise OptionError(f"--worker-ms must be above 0, not {self.worker_ms}")


def bench_pipeline(setup: PipelineSetup, work: Workload, console: Console) -> dict[str, Any]:
    """Measure both schedules in alternation. Raises OptionError and every error of ``LLM``."""
    work.check()
    setup.check(work.tokens)
    rates = ceilings(setup.dtype, "cpu", setup.threads)
    print_ceilings(rates, console)
    trusted_s, calls = _trusted_seconds(setup, work)
    worker_ms = trusted_s / calls * 1e3 if setup.worker_ms is None else setup.worker_ms
    console.print(f"trusted side {trusted_s / calls * 1e3:.2f} ms, worker {worker_ms:.2f} ms for each of {calls} calls")
    seconds: dict[str, list[float]] = {"sequential": [], "pipelined": []}
    with ExitStack() as stack:
        child = stack.enter_context(Child(MODULE, *_arguments(setup, worker_ms)))
        legs = {
            "sequential": stack.enter_context(_connect(setup, work, child, pipelined=False)),
            "pipelined": stack.enter_context(_connect(setup, work, child, pipelined=True)),
        }
        made = {}
        for warm in watched(range(-1, work.runs), console, "pipeline"):
            for name, llm in legs.items():
                elapsed, made[name] = _prefill(llm, work)
                if warm >= 0:
                    seconds[name].append(elapsed)
        micro_batches = legs["pipelined"].stats.micro_batches
    sequential, pipelined = (statistics.median(seconds[name]) for name in ("sequential", "pipelined"))
    return {
        "benchmark": "pipeline",
        "model": setup.model,
        "partition": "linear",
        "transport": setup.transport,
        "dtype": setup.dtype,
        "tokens": work.tokens,
        "threads": setup.threads or cores(),
        "runs": work.runs,
        "micro_batches": micro_batches,
        "calls": made,
        "trusted_ms": trusted_s / calls * 1e3,
        "worker_ms": worker_ms,
        "seconds": pipelined,
        "peer": {"name": "the same calls, one after the other", "seconds": sequential},
        "ratio": pipelined / sequential,
        "limit_seconds": max(trusted_s, calls * worker_ms / 1e3),
        "all_seconds": {"ours": seconds["pipelined"], "peer": seconds["sequential"]},
        "ceilings": rates,
        "machine": machine(),
    }


def _trusted_seconds(setup: PipelineSetup, work: Workload) -> tuple[float, int]:
    """Time of the sequential schedule with a worker that does not wait, and its calls: median of three."""
    with Child(MODULE, *_arguments(setup, 0.0)) as child, _connect(setup, work, child, pipelined=False) as llm:
        timed = [_prefill(llm, work) for _ in range(4)][1:]
    return statistics.median(seconds for seconds, _ in timed), timed[0][1]


def _arguments(setup: PipelineSetup, wait_ms: float) -> tuple[str, ...]:
    return locate(setup.model), fresh_address(setup.transport), str(wait_ms)


def _connect(setup: PipelineSetup, work: Workload, child: Child, *, pipelined: bool) -> LLM:
    """N micro-batches that interleave, or N chunks of the same rows one after the other."""
    rows = -(-work.tokens // setup.micro_batches)
    return LLM(
        setup.model,
        protection="open",
        worker=child.address,
        compute=ComputeConfig(
            dtype=setup.dtype,
            prefill_chunk=work.tokens if pipelined else rows,
            micro_batches=setup.micro_batches if pipelined else 1,
            threads=setup.threads or cores(),
        ),
    )


def _prefill(llm: LLM, work: Workload) -> tuple[float, int]:
    """Seconds and calls of one prefill."""
    llm.stats.reset()
    llm.generate(work.prompt(), SamplingParams(max_tokens=1, ignore_eos=True))
    return llm.stats.prefill_s, llm.stats.rpc_calls
