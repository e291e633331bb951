"""``bench all``: the whole set, each result into a file of its own."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from tsqp.api.config import RunConfig
from tsqp.bench.device import check_device, device_figures, prefix
from tsqp.bench.files import check_directory, file_name, save
from tsqp.bench.guard import bench_guard
from tsqp.bench.names import PeerName, TransportName, benchmarked
from tsqp.bench.opened import plain
from tsqp.bench.origin import bench_origin
from tsqp.bench.pipeline import PipelineSetup, bench_pipeline
from tsqp.bench.private import bench_private
from tsqp.bench.rpc import bench_rpc
from tsqp.bench.show import table
from tsqp.bench.split import bench_split
from tsqp.bench.tree import check_tree
from tsqp.bench.workload import Workload
from tsqp.config.dtype import float_dtype
from tsqp.errors import OptionError

RPC_TRANSPORTS: tuple[TransportName, ...] = ("ipc", "tcp", "shm")


@dataclass(frozen=True)
class Everything:
    """What is measured: every model split and unsplit, the line; at the first also private modes, pipeline, origin."""

    models: tuple[str, ...]
    run: RunConfig
    work: Workload
    rpc_bytes: int
    rpc_calls: int
    directory: Path
    prefix: str
    dirty_ok: bool

    def check(self) -> None:
        """Raises OptionError."""
        self.work.check()
        check_device(self.run.worker.device)
        if not self.models:
            raise OptionError("--models names no model")
        check_directory(self.directory)
        check_tree(dirty_ok=self.dirty_ok)


def bench_all(setup: Everything, console: Console) -> list[dict[str, Any]]:
    """Measure, print each table, write each file. Raises OptionError and every error of ``LLM``."""
    setup.check()
    figures = device_figures(setup.run.worker.device)  # no address is asked for beside a device
    results = []
    for name, measured in _measurements(setup, console):
        result = {**measured, **figures}
        console.print(table(result))
        save(result, setup.directory, f"{setup.prefix}{name}", console)
        results.append(result)
    return results


def _measurements(setup: Everything, console: Console) -> Iterator[tuple[str, dict[str, Any]]]:
    work = setup.work
    for transport in RPC_TRANSPORTS:
        yield f"rpc-{transport}", bench_rpc(transport, setup.rpc_bytes, setup.rpc_calls, work.runs, console)
    for model in setup.models:
        for suffix, run in _variants(replace(setup.run, model=model), first=model == setup.models[0]):
            peer: PeerName | None = "ours" if run.compute.dtype == "int8" else None
            for phase, result in bench_split(run, work, peer, None, console).items():
                yield f"{phase}-{file_name(model)}{suffix}", result
            gc.collect()  # a model's weights are gigabytes, and the next ones come
    first = replace(plain(setup.run), model=setup.models[0], protection="masked")
    yield f"private-{file_name(first.model)}", bench_private(first, work, console)
    gc.collect()
    yield f"guard-{file_name(first.model)}", bench_guard(first, work, console)
    gc.collect()
    if prefix(setup.run.worker.device):
        return  # what is left computes on the CPU whatever the device: a worker that waits, and the origin's
    threads = setup.run.compute.threads
    dtype = float_dtype(benchmarked(setup.run.compute.dtype))
    pipeline = PipelineSetup(setup.models[0], RPC_TRANSPORTS[-1], dtype, 8, None, threads)
    yield "pipeline", bench_pipeline(pipeline, work, console)
    yield "origin", bench_origin(setup.models[0], work, threads, console)


def _variants(run: RunConfig, *, first: bool) -> Iterator[tuple[str, RunConfig]]:
    """The run asked for; at the first model also the other ways to run it."""
    yield "", run
    if first:
        bare = plain(run)
        if "," not in run.worker.device:  # partition layer is of one device
            yield "-layer", replace(bare, compute=replace(bare.compute, partition="layer"))
        yield "-int8", replace(bare, compute=replace(bare.compute, dtype="int8"))
