"""What the trusted side and the line take in real passes, without the worker's products. For ``bench constants``."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from tsqp.api.config import GuardConfig, RunConfig
from tsqp.api.llm import LLM
from tsqp.bench.keyed_worker import keyed_worker
from tsqp.bench.offload import filled
from tsqp.bench.opened import opened
from tsqp.bench.pads import ready_for, with_pads
from tsqp.checkpoint import locate
from tsqp.model.batch import Batch
from tsqp.model.cache import KVCache
from tsqp.plan.constants import PrivateMode
from tsqp.trusted.stats import total

READY_ROWS = 256


@dataclass(frozen=True)
class PassTime:
    """Of one pass, the least of several. ``trusted``: its seconds but for the worker's products, ``worker``.

    ``attention``: of the trusted ones.
    """

    whole: float
    trusted: float
    worker: float
    attention: float


def pass_time(llm: LLM, rows: list[int], context: int, runs: int) -> PassTime:
    """A pass with so many new tokens of each sequence, after ``context`` others each; pads are ready.

    The least of ``runs``, after one that does not count: others may use the cores. With a context the caches are the
    same ones each time, and a few tokens longer, as those of an answer are.
    """
    found = []
    caches: list[KVCache] = []
    together = max(1, READY_ROWS // sum(rows))  # passes whose pads are made at once
    for turn in range(runs + 1):
        if not caches or not context:
            caches = [filled(llm.engine.decoder.new_cache(), llm.config, context) for _ in rows]
        if turn % together == 0:
            ready_for(llm, together * sum(rows), together * len(rows))
        llm.stats.reset()
        start = time.perf_counter()
        llm.engine.run(Batch([[7] * count for count in rows], caches))
        whole = time.perf_counter() - start
        worker = total(llm.stats.calls.values()).worker_s
        found.append((whole, whole - worker, worker, llm.stats.operator_s["softmax"]))
    return PassTime(*(min(one[1:]) for one in zip(*found, strict=True)))


@contextmanager
def private(model: str, mode: PrivateMode, room: int, console: Console, *, compiled: bool = True) -> Iterator[LLM]:
    """A model over shm, with room for the pads of ``room`` tokens."""
    with opened(private_run(model, mode, room, compiled=compiled), console) as llm:
        yield llm


@contextmanager
def private_over_tcp(model: str, mode: PrivateMode, room: int, console: Console) -> Iterator[LLM]:
    """The same over tcp with keys, on this machine."""
    with (
        tempfile.TemporaryDirectory(prefix="tsqp-keys-") as keys,
        keyed_worker(locate(model), Path(keys)) as worker,
        opened(worker.of(private_run(model, mode, room)), console) as llm,
    ):
        yield llm


@contextmanager
def alone(model: str, console: Console) -> Iterator[LLM]:
    """The same model without a worker, by 8-bit weights."""
    run = RunConfig(model, "local")
    with opened(replace(run, compute=replace(run.compute, dtype="int8")), console) as llm:
        yield llm


def private_run(model: str, mode: PrivateMode, room: int, *, compiled: bool = True) -> RunConfig:
    """Over shm, with room for the pads of ``room`` tokens."""
    return with_pads(RunConfig(model, mode, guard=GuardConfig(compiled_step=compiled)), room)
