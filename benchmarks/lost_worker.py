"""How long a stream pauses when its worker is killed, and where that time goes.

    python -m benchmarks.lost_worker [--model default] [--protection masked] [--runs 5]

``started here``: the worker beside this process is killed with SIGKILL between two tokens, and another is started.
``spare``: the same with ``--spare``, once the spare has loaded. ``standby``: a standing worker is killed, and a second
standing one takes over. The pause is the time from the signal to the next token; the parts are ``start`` (the new
process, until it listens), ``vectors`` (fresh check vectors, made meanwhile), ``greeting`` (connection, handshake,
tables of the compiled step) and ``rest`` (detection, pads that were not ready, the step itself). Medians count.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.machine import RESULTS, add_dirty_ok, check_tree, machine
from tsqp import LLM, ComputeConfig, SamplingParams, WorkerConfig
from tsqp.api.links import SplitLinks
from tsqp.api.private_links import PrivateLinks
from tsqp.checkpoint import locate
from tsqp.config.dtype import ComputeDtype
from tsqp.cores import cores
from tsqp.launch.local import LocalWorker

PARAMS = SamplingParams(max_tokens=10_000, ignore_eos=True)
PROMPT = list(range(100, 132))
BEFORE = 12  # tokens before each kill


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--protection", default="masked", choices=["masked", "verified", "open"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--output", type=Path, default=RESULTS / "lost-worker.json")
    add_dirty_ok(parser)
    options = parser.parse_args()
    check_tree(options)
    console, rows = Console(), dict[str, Any]()
    for name, measure in (("started here", started_here), ("spare", spare), ("standby", standby)):
        parts = list(measure(options))
        rows[name] = {part: statistics.median(run[part] for run in parts) for part in parts[0]}
        rows[name]["all_pause_s"] = [run["pause_s"] for run in parts]
        console.print(name, {part: round(s, 3) for part, s in rows[name].items() if isinstance(s, float)})
    result = {
        "benchmark": "lost-worker",
        "model": options.model,
        "protection": options.protection,
        "threads": options.threads,
        "runs": options.runs,
        "rows": rows,
        "machine": machine(),
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")


def started_here(options: argparse.Namespace) -> Iterator[dict[str, float]]:
    """Each run kills the worker that the last one has started."""
    compute = ComputeConfig(threads=options.threads)
    with parts_of() as parts, LLM(options.model, protection=options.protection, compute=compute) as llm:
        for _ in range(options.runs):
            yield paused(llm, parts, lambda: os.kill(llm.worker_pid or 0, signal.SIGKILL))


def spare(options: argparse.Namespace) -> Iterator[dict[str, float]]:
    """Each run waits for the spare that the last one has started."""
    config, compute = WorkerConfig(spare=True), ComputeConfig(threads=options.threads)
    with parts_of() as parts, LLM(options.model, protection=options.protection, worker=config, compute=compute) as llm:
        for _ in range(options.runs):
            waiting = llm._started._spare if llm._started is not None else None
            if waiting is not None:
                waiting.wait_ready()
            yield paused(llm, parts, lambda: os.kill(llm.worker_pid or 0, signal.SIGKILL))


def standby(options: argparse.Namespace) -> Iterator[dict[str, float]]:
    """Each run has two workers of its own."""
    dtype: ComputeDtype = "field" if options.protection != "open" else "bfloat16"
    for _ in range(options.runs):
        with ExitStack() as stack:
            started = [
                LocalWorker(locate(options.model), device="cpu", dtype=dtype, threads=options.threads) for _ in range(2)
            ]
            addresses = tuple(stack.enter_context(one).wait_ready() for one in started)
            parts = stack.enter_context(parts_of())
            llm = stack.enter_context(
                LLM(
                    options.model,
                    protection=options.protection,
                    worker=WorkerConfig(addresses),
                    compute=ComputeConfig(threads=options.threads),
                )
            )
            yield paused(llm, parts, started[0].kill)


def paused(llm: LLM, parts: dict[str, float], kill: Callable[[], None]) -> dict[str, float]:
    """Seconds of one pause and of its parts."""
    stream = llm.stream(PROMPT, PARAMS)  # ends with the reference to it
    for _ in range(BEFORE):
        next(stream)
    parts.clear()
    start = time.perf_counter()
    kill()
    next(stream)  # may have been computed before
    next(stream)
    pause = time.perf_counter() - start
    if parts.get("start", 0.0) > pause:  # a spare's, which was over before
        del parts["start"]
    known = parts.get("greeting", 0.0) + max(parts.get("start", 0.0), parts.get("vectors", 0.0))
    return {
        "pause_s": pause,
        **{f"{part}_s": parts.get(part, 0.0) for part in ("start", "vectors", "greeting")},
        "rest_s": pause - known,
    }


@contextmanager
def parts_of() -> Iterator[dict[str, float]]:
    """Seconds of each part, as they come."""
    parts: dict[str, float] = {}
    began: dict[int, float] = {}
    init, ready = LocalWorker.__init__, LocalWorker.wait_ready

    def starting(self: LocalWorker, *arguments: Any, **named: Any) -> None:
        began[id(self)] = time.perf_counter()
        init(self, *arguments, **named)

    def waiting(self: LocalWorker, *arguments: Any) -> str:
        address, now = ready(self, *arguments), time.perf_counter()
        parts["start"] = now - began[id(self)]
        parts["waited"] = now
        return address

    def renewing(real: Any) -> Any:
        def renew(self: Any, *arguments: Any) -> None:
            start = time.perf_counter()
            real(self, *arguments)
            parts["vectors"] = parts.get("vectors", 0.0) + time.perf_counter() - start

        return renew

    def connecting(real: Any) -> Any:
        def connect(self: Any, *arguments: Any) -> Any:
            start = time.perf_counter()
            link = real(self, *arguments)
            parts["greeting"] = time.perf_counter() - max(start, parts.pop("waited", 0.0))
            return link

        return connect

    patched: list[tuple[Any, str, Any]] = [(LocalWorker, "__init__", starting), (LocalWorker, "wait_ready", waiting)]
    for links in (PrivateLinks, SplitLinks):
        patched += [(links, "renew", renewing(links.renew)), (links, "connect", connecting(links.connect))]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in patched]
    for owner, name, replacement in patched:
        setattr(owner, name, replacement)
    try:
        yield parts
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


if __name__ == "__main__":
    main()
