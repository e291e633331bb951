"""Where the trusted side's time of a masked prefill goes: processor time of its pieces, on all threads.

    python -m benchmarks.prefill_path [--model synthetic:llama-3.2-1b] [--tokens 1024] [--protection masked] [--runs 5]

A worker over shm and this process share the machine's processors. Pads are ready. Once nothing but the whole pass is
timed; then every piece on its own: what a function takes without the pieces that it calls, as processor time of its
thread, summed over threads. Other processes do not count into that, and pages that are touched for the first time do.
Each piece takes some 2 µs more for being timed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: the worker uses the same cores

from benchmarks.machine import RESULTS, add_dirty_ok, check_tree, machine
from tsqp import LLM, ComputeConfig
from tsqp.api.config import GuardConfig
from tsqp.api.pads import pool_bytes
from tsqp.bench.pads import fill, pads_of
from tsqp.checkpoint import locate, open_checkpoint
from tsqp.cores import cores
from tsqp.model.batch import Batch
from tsqp.trusted.stats import total

SHM = "tsqp.wire.transport.shm.channel:ShmChannel"
PIECES = {
    "norm, loop": "tsqp.model.compiled:rms_norm",
    "residual and norm, loop": "tsqp.model.compiled:add_rms_norm",
    "rotary, loop": "tsqp.model.compiled:store",
    "rotary and keys": "tsqp.model.kernels:CompiledKernels.store",
    "SiLU·up, loop": "tsqp.model.compiled:silu_mul",
    "attention, loop": "tsqp.model.compiled_attention:attend_rows",
    "memory of a call": "tsqp.trusted.guard.linears:Desk.__init__",
    "guard, start": "tsqp.trusted.guard.linears:CheckedLinears.start",
    "pads, rows taken": "tsqp.trusted.guard.pool:PadPool.take",
    "pads, expanded": "tsqp.trusted.guard.pads:PadBlock.pads",
    "mask, loop": "tsqp.trusted.guard.kernels:quantise_and_mask",
    "guard, finish": "tsqp.trusted.guard.linears:CheckedLinears.finish",
    "check, loop": "tsqp.trusted.guard.kernels:verify_and_unmask",
    "session, ask": "tsqp.trusted.remote.session:WorkerSession.ask",
    "session, reply": "tsqp.trusted.remote.session:WorkerSession.finish",
    "rows on threads": "tsqp.arith.row_threads:RowThreads.run",
}


class Pieces:
    """Processor time of functions in seconds, each without those within it, of every thread."""

    def __init__(self) -> None:
        self.open = False
        self.cpu_s: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)
        self._lock = threading.Lock()
        self._of_thread = threading.local()

    def watch(self, name: str, where: str) -> None:
        """Time this function from now on, wherever it is looked up."""
        module, _, path = where.partition(":")
        *owners, attribute = path.split(".")
        owner = importlib.import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, attribute, self._timed(name, getattr(owner, attribute)))

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            if not hasattr(self._of_thread, "within"):
                self._of_thread.within = []
            within: list[float] = self._of_thread.within
            within.append(0.0)
            start = time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                took = time.thread_time() - start
                inner = within.pop()
                if within:
                    within[-1] += took
                if self.open:
                    with self._lock:
                        self.cpu_s[name] += took - inner
                        self.calls[name] += 1

        return timed


def one_pass(llm: LLM, tokens: int, pieces: Pieces | None) -> dict[str, float]:
    """Times of one prefill, in seconds, and the pages that it touched for the first time."""
    if llm.plan.protection.masked:
        fill(*pads_of(llm))
    cache = llm.engine.decoder.new_cache()
    llm.stats.reset()
    if pieces is not None:
        pieces.open = True
    before, busy, start = resource.getrusage(resource.RUSAGE_SELF), time.process_time(), time.perf_counter()
    llm.engine.run(Batch([[7] * tokens], [cache]))
    wall_s, busy_s = time.perf_counter() - start, time.process_time() - busy
    after = resource.getrusage(resource.RUSAGE_SELF)
    if pieces is not None:
        pieces.open = False
    return {
        "wall_s": wall_s,
        "trusted_s": wall_s - total(llm.stats.calls.values()).worker_s,
        "processor_s": busy_s,
        "system_s": after.ru_stime - before.ru_stime,
        "page_faults": after.ru_minflt - before.ru_minflt,
        **{f"{name}_s": seconds for name, seconds in llm.stats.operator_s.items() if seconds},
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="synthetic:llama-3.2-1b")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--protection", default="masked", choices=["open", "verified", "masked"])
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "prefill-path.json")
    add_dirty_ok(parser)
    options = parser.parse_args()
    check_tree(options)
    guard = None
    if options.protection == "masked":
        memory = pool_bytes(open_checkpoint(locate(options.model)).config, options.tokens)
        guard = GuardConfig(pads_ahead=options.tokens, pad_memory=memory)
    compute = ComputeConfig(threads=options.threads, dtype="bfloat16" if options.protection == "open" else "auto")
    load, pieces = os.getloadavg()[0], Pieces()
    with LLM(options.model, protection=options.protection, guard=guard, compute=compute) as llm:
        whole = [one_pass(llm, options.tokens, None) for _ in range(options.runs + 1)][1:]
        for name, where in PIECES.items():
            pieces.watch(name, where)
        for _ in range(options.runs):
            one_pass(llm, options.tokens, pieces)
    figures = {name: statistics.median(one[name] for one in whole) for name in whole[0]}
    figures |= {f"least_{name}": min(one[name] for one in whole) for name in ("wall_s", "trusted_s")}
    rows = {
        name: {"processor_s": seconds / options.runs, "calls": pieces.calls[name] / options.runs}
        for name, seconds in sorted(pieces.cpu_s.items(), key=lambda item: -item[1])
    }
    for name, row in rows.items():
        print(f"{name:26s} {row['calls']:8.0f} calls {1e3 * row['processor_s']:8.1f} ms")
    print(", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    result = {"benchmark": "prefill_path", "model": options.model, "protection": options.protection}
    result |= {"tokens": options.tokens, "threads": options.threads, "runs": options.runs}
    result |= {"whole": figures, "pieces": rows, "load_before": load, "machine": machine()}
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
