"""Where the time of one call goes: processor time of the pieces of a decode step, on both sides of the line.

    python -m benchmarks.call_path [--model synthetic:llama-3.2-1b] [--protection masked] [--steps 32] [--runs 3]

A worker over shm and this process decode ``--steps`` tokens after a prompt of 64, ``--runs`` times. Pads are ready.
Once only the whole step and the waiting for replies are timed, in private modes as the one loop that a decode step is
and call by call in Python, with a worker that answers in a loop and with one that answers in Python; then every piece
of Python on its own: what a function takes without the pieces that it
calls, as processor time of its thread, which other processes do not count into. Each piece takes some 2 µs more for
being timed, which its caller shows: the sum of the pieces is more than the whole.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: as in a worker, which shares its cores

import torch

from benchmarks.machine import RESULTS, add_dirty_ok, check_tree, machine
from tsqp import LLM, ComputeConfig, SamplingParams
from tsqp.api.config import GuardConfig, WorkerConfig
from tsqp.bench.pads import fill, pads_of
from tsqp.bench.workload import Workload
from tsqp.wire.transport import new_shm_address

TOKENS = 64
SHM = "tsqp.wire.transport.shm"
WHOLE = {
    "the whole step": "tsqp.trusted.engine.engine:Engine._forward",
    "waiting": f"{SHM}.channel:ShmChannel._receive",
}
PIECES = {
    "norm": "tsqp.model.kernels:CompiledKernels.rms_norm",
    "residual and norm": "tsqp.model.kernels:CompiledKernels.add_rms_norm",
    "rotary, keys and values stored": "tsqp.model.kernels:CompiledKernels.store",
    "SiLU·up": "tsqp.model.kernels:CompiledKernels.silu_mul",
    "attention": "tsqp.model.block_attention:BlockAttention.attend_steps",
    "attention by torch": "tsqp.model.local:attend",
    "counting, start": "tsqp.trusted.metered:MeteredLinears.start",
    "counting, finish": "tsqp.trusted.metered:MeteredProduct.wait",
    "guard, start": "tsqp.trusted.guard.linears:CheckedLinears.start",
    "guard, ask": "tsqp.trusted.guard.linears:CheckedLinears._ask",
    "guard, loop that masks": "tsqp.trusted.guard.kernels:quantise_and_mask",
    "guard, finish": "tsqp.trusted.guard.linears:CheckedLinears.finish",
    "guard, copy and verdict": "tsqp.trusted.guard.linears:CheckedLinears._verify_and_unmask",
    "guard, loop that checks": "tsqp.trusted.guard.kernels:verify_and_unmask",
    "pads, rows taken": "tsqp.trusted.guard.pool:PadPool.take",
    "pads, expanded": "tsqp.trusted.guard.pads:PadBlock.pads",
    "open, ask": "tsqp.trusted.remote.linears:OpenLinears.start",
    "session, ask": "tsqp.trusted.remote.session:WorkerSession.ask",
    "session, reply checked": "tsqp.trusted.remote.session:WorkerSession._take",
    "session, finish": "tsqp.trusted.remote.session:WorkerSession.finish",
    "line, memory laid out": f"{SHM}.arena:Arena.reserve",
    "line, packet sent": f"{SHM}.channel:ShmChannel._sent",
    "line, asleep": f"{SHM}.channel:ShmChannel._await_reply",
}
WORKER = {
    "worker, waiting": f"{SHM}.listener:ShmListener.receive",
    "worker, request read": f"{SHM}.connection:Connection.receive",
    "worker, call decoded": "tsqp.untrusted.worker:Worker.answer",
    "worker, field call": "tsqp.untrusted.paths.field:FieldOperators.__call__",
    "worker, float call": "tsqp.untrusted.paths.plain:Operators.__call__",
    "worker, answer sent": f"{SHM}.listener:ShmListener.send",
    "worker, rows on threads": "tsqp.arith.row_threads:RowThreads.run",
}


class Book:
    """Times of pieces, in seconds, each without the pieces within it; of the main thread only."""

    def __init__(self) -> None:
        self.open = False
        self.times: defaultdict[str, list[float]] = defaultdict(list)
        self._within: list[float] = []
        self._undo: list[tuple[Any, str, Any]] = []

    def watch(self, pieces: dict[str, str]) -> None:
        """Time these functions from now on, wherever they are looked up."""
        for name, where in pieces.items():
            module, _, path = where.partition(":")
            *owners, attribute = path.split(".")
            owner = importlib.import_module(module)
            for part in owners:
                owner = getattr(owner, part)
            self._undo.append((owner, attribute, getattr(owner, attribute)))
            setattr(owner, attribute, self._timed(name, getattr(owner, attribute)))

    def leave(self) -> None:
        """Time nothing any more."""
        for owner, attribute, function in self._undo:
            setattr(owner, attribute, function)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return function(*arguments, **named)
            self._within.append(0.0)
            start = time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                took = time.thread_time() - start
                within = self._within.pop()
                if self._within:
                    self._within[-1] += took
                if self.open:
                    self.times[name].append(took - within)

        return timed


def serve(report: str, options: list[str]) -> int:
    """The worker's side: as ``python -m tsqp.untrusted``; its pieces go to ``report`` in the end, unless that is -."""
    from tsqp.untrusted import __main__, worker

    book, real = Book(), worker.Worker.serve

    def watched(self: Any, listener: Any) -> None:
        if report != "-":  # only now: loops are imported once their cache is known
            book.watch(WORKER)
            book.open = True
        real(self, listener)

    worker.Worker.serve = watched  # type: ignore[method-assign]
    code = __main__.main(options)
    if report != "-":
        Path(report).write_text(json.dumps(book.times))
    return code


def measure(
    options: argparse.Namespace, pieces: dict[str, str], report: str, *, compiled: bool, calls: bool
) -> tuple[dict[str, float], Book]:
    """Figures of a token, in ms, and the times of the pieces. ``compiled``: as one loop, in a private mode.

    ``calls``: whether the worker answers in a loop.
    """
    masked, threads, address = options.protection == "masked", len(os.sched_getaffinity(0)), new_shm_address()
    dtype = "bfloat16" if options.protection == "open" else "field"
    command = [sys.executable, "-m", "benchmarks.call_path", "--serve", report, "--model", options.model]
    command += ["--device", "cpu", "--dtype", dtype, "--listen", address, "--threads", str(threads)]
    command += [] if calls else ["--no-compiled-calls"]
    started = subprocess.Popen([*command, "--exit-with-stdin"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with started as worker:
        if worker.stdin is None or worker.stdout is None or not worker.stdout.readline():
            raise SystemExit("the worker did not start; what it said is above")
        compute = ComputeConfig(dtype="bfloat16" if dtype == "bfloat16" else "auto", threads=threads)
        guard = GuardConfig(compiled_step=compiled) if options.protection != "open" else None
        if masked:
            guard = GuardConfig(compiled_step=compiled, pads_ahead=TOKENS + options.steps + 64, pad_memory=8 << 30)
        run = LLM(
            options.model, protection=options.protection, worker=WorkerConfig(address), guard=guard, compute=compute
        )
        with run as llm:
            book = Book()
            book.watch(pieces)
            found = [one_run(llm, options.steps, book, masked, warm=index == 0) for index in range(options.runs + 1)][
                1:
            ]
            book.leave()
        worker.stdin.close()
    return {name: statistics.median(one[name] for one in found) for name in found[0]}, book


def one_run(llm: LLM, steps: int, book: Book, masked: bool, *, warm: bool) -> dict[str, float]:
    """One answer. Of each token: wall time, what the worker says it computed for, this thread's processor time."""
    if masked:
        fill(*pads_of(llm))
    answer = llm.stream(Workload(TOKENS, steps, 1).prompt(), SamplingParams(max_tokens=steps + 1, ignore_eos=True))
    next(answer)
    llm.stats.reset()
    book.open, start, busy = not warm, time.perf_counter(), time.thread_time()
    for _ in range(steps):
        next(answer)
    wall, busy, book.open = time.perf_counter() - start, time.thread_time() - busy, False
    worker_s = sum(call.worker_s for call in llm.stats.calls.values())
    line_s = sum(call.rpc_s for call in llm.stats.calls.values()) - worker_s
    figures = {"wall_ms": wall, "worker_ms": worker_s, "line_ms": line_s, "processor_ms": busy}
    figures |= {"trusted_and_line_ms": wall - worker_s, "calls": llm.stats.rpc_calls * 1e-3}
    for _ in answer:
        raise SystemExit("more tokens than were asked for")
    return {name: 1e3 * value / steps for name, value in figures.items()}


def rows_of(times: dict[str, list[float]], steps: int) -> dict[str, dict[str, float]]:
    """Of each piece: how often in a step, and the median and the mean of its processor time in µs."""
    return {
        name: {
            "per_step": len(found) / steps,
            "median_us": 1e6 * statistics.median(found),
            "mean_us": 1e6 * statistics.fmean(found),
        }
        for name, found in times.items()
    }


def main() -> None:
    """Measure, print, write."""
    if sys.argv[1:2] == ["--serve"]:
        sys.exit(serve(sys.argv[2], sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="synthetic:llama-3.2-1b")
    parser.add_argument("--protection", default="masked", choices=["open", "verified", "masked"])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "call-path.json")
    add_dirty_ok(parser)
    options = parser.parse_args()
    check_tree(options)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    load = os.getloadavg()[0]
    whole, book = measure(options, WHOLE, "-", compiled=True, calls=True)
    answered, _ = measure(options, WHOLE, "-", compiled=True, calls=False)
    without, _ = measure(options, WHOLE, "-", compiled=False, calls=False)
    result: dict[str, Any] = {
        "token": whole,
        "token_worker_in_python": answered,
        "token_in_python": without,
        "whole": rows_of(book.times, options.steps * options.runs),
    }
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "worker.json"
        _, book = measure(options, PIECES, str(report), compiled=False, calls=False)
        result["pieces"] = rows_of(book.times, options.steps * options.runs)
        result["worker"] = rows_of(json.loads(report.read_text()), options.steps * (options.runs + 1))
    for name, row in {**result["whole"], **result["pieces"], **result["worker"]}.items():
        print(f"{name:26s} {row['per_step']:7.1f} a step, median {row['median_us']:8.1f} µs", flush=True)
    ways = ("both sides compiled", whole), ("the worker in Python", answered), ("call by call", without)
    for way, token in ways:
        print(f"{way}: " + ", ".join(f"{name} {value:.2f}" for name, value in token.items()))
    result |= {"benchmark": "call_path", "model": options.model, "protection": options.protection}
    result |= {"steps": options.steps, "runs": options.runs, "load_before": load, "machine": machine()}
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
