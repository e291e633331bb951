"""Workers on this machine that hold a model together, named by a roster as a cluster's are."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from tsqp.api.llm import LLM
from tsqp.bench.child import Child
from tsqp.bench.opened import opened
from tsqp.bench.trusted_times import private_run
from tsqp.checkpoint import locate
from tsqp.config.model import ModelConfig
from tsqp.config.shard import even_shards
from tsqp.cores import cores
from tsqp.plan.cluster import Team
from tsqp.plan.constants import PrivateMode, TransportKind
from tsqp.wire.transport import new_shm_address
from tsqp.wire.transport.keys import KeyFiles, create_keys, load_public


@contextmanager
def team(
    model: str,
    shards: Sequence[str],
    mode: PrivateMode,
    transport: TransportKind,
    room: int,
    console: Console,
    *,
    threads: int | None = None,
) -> Iterator[LLM]:
    """A model by workers with these shards; over tcp each has a key. ``threads``: of each worker, all cores for None.

    Raises WorkerUnreachable, every error of ``LLM``.
    """
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tsqp-team-")))
        own = create_keys(directory, "client") if transport == "tcp" else None
        members = []
        for number, shard in enumerate(shards):
            keys = None if own is None else create_keys(directory, f"worker-{number}")
            child = stack.enter_context(Child("tsqp.untrusted", *_arguments(model, shard, threads, own, keys)))
            key = {} if keys is None else {"key": load_public(keys.public).decode("ascii")}
            members.append({"address": child.address, "shard": shard, **key})
        roster = directory / "roster.json"
        roster.write_text(json.dumps({"version": 1, "epoch": 1, "workers": members}), encoding="utf-8")
        run = private_run(model, mode, room)
        worker = replace(run.worker, address=f"roster://{roster}", key=None if own is None else own.secret)
        yield stack.enter_context(opened(replace(run, worker=worker), console))


def shards_of(config: ModelConfig, of: Team) -> list[str]:
    """The shard of each worker of a team: replicas of one side by side. Raises OptionError."""
    return [str(shard) for shard in even_shards(config, of.layers, of.columns) for _ in range(of.replicas)]


def threads_of(columns: int) -> int:
    """Threads of each worker, where so many compute at once on this machine: an equal share of its cores, or one."""
    return max(1, cores() // columns)


def _arguments(model: str, shard: str, threads: int | None, own: KeyFiles | None, keys: KeyFiles | None) -> list[str]:
    found = ["--model", locate(model), "--dtype", "field", "--shard", shard, "--exit-with-stdin"]
    found += [] if threads is None else ["--threads", str(threads)]
    if own is None or keys is None:
        return [*found, "--listen", new_shm_address()]
    return [*found, "--listen", "tcp://127.0.0.1:0", "--key", str(keys.secret), "--allow", str(own.public)]
