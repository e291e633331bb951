"""A real Ray of three nodes on this machine.

A node is killed, and workers come and go, in the middle of eight answers: these are what one worker gives. A worker
that ends is started again. All of it listens on loopback, its control port asks for the token, and a second cluster
comes and goes beside it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cluster.nodes import all_listening, alone_on_this_machine, listening, lose, processes, raylets, shared_memory
from tests.commands import Home, Result, now
from tests.families import random_tokens, tiny_model
from tests.trusted.guard.hostile import serve
from tests.trusted.guard.scan import shared_pads
from tsqp import LLM, AsyncLLM, SamplingParams
from tsqp.audit.capture import Capture
from tsqp.cluster.own_ray import _probe, access
from tsqp.cluster.processes import processes_of
from tsqp.cluster.state import ClusterDirectory
from tsqp.wire.channel import Channel
from tsqp.wire.messages import Product

pytestmark = pytest.mark.slow
MODEL = str(tiny_model("llama").directory)  # two layers
PROMPTS = [random_tokens(5 + number, seed=number) for number in range(8)]
LONG = SamplingParams(max_tokens=60, ignore_eos=True)
PATIENCE_S = 250.0  # four workers load torch at once, on a machine that may be busy
LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")


class Cluster:
    """That of these tests has 2 shards with 2 workers each, on 3 nodes."""

    def __init__(self, home: Home, name: str) -> None:
        self.home, self.name = home, name

    @property
    def directory(self) -> ClusterDirectory:
        return ClusterDirectory(self.name, self.home.runtime / "tsqp" / "clusters" / self.name)

    def command(self, command: str, *options: object) -> Result:
        with self.home.started("cluster", command, "--name", self.name, *map(str, options)) as process:
            out, err = process.communicate(timeout=PATIENCE_S)
        return Result(process.returncode, out.decode(), err.decode())

    def run(self, command: str, *options: object) -> dict[str, Any]:
        done = self.command(command, *options, "--json")
        assert done.code == 0 or command == "status", done.err
        return dict(json.loads(done.out))

    def wait_until(self, holds: Callable[[list[dict[str, Any]]], bool]) -> dict[str, Any]:
        """The first status whose workers are so; each look takes a process that loads Ray."""
        until = now() + PATIENCE_S
        while not holds((status := self.run("status"))["workers"]):
            assert now() < until, status
        return status


def all_listen(workers: list[dict[str, Any]]) -> bool:
    return all(worker["state"] == "listening" for worker in workers)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    home = Home()
    made = Cluster(home, "three")
    options = ("--model", MODEL, "--columns", 2, "--replicas", 2, "--nodes", 3, "--threads", 1)
    with alone_on_this_machine():
        try:
            made.run("up", *options)
            yield made
        finally:
            made.command("down")
            home.remove()


@pytest.fixture(scope="module")
def alone() -> list[tuple[int, ...]]:
    """What a run with one worker answers."""
    with serve(MODEL) as (_, address), LLM(MODEL, protection="masked", worker=address) as llm:
        return asyncio.run(streams(llm))


async def streams(llm: LLM, halfway: Callable[[], object] | None = None) -> list[tuple[int, ...]]:
    """The tokens of eight answers at once; ``halfway`` is called once, when one of them is under way."""
    begun = asyncio.Event()

    async def one(model: AsyncLLM, prompt: list[int]) -> tuple[int, ...]:
        tokens: tuple[int, ...] = ()
        async for delta in model.stream(prompt, LONG):
            begun.set()
            tokens = delta.completion.token_ids if delta.completion is not None else tokens
        return tuple(tokens)

    async with AsyncLLM(llm) as model:
        answers = asyncio.gather(*(one(model, prompt) for prompt in PROMPTS))
        if halfway is not None:
            await begun.wait()
            await asyncio.to_thread(halfway)
        return await answers


class Seen:
    """What each worker was sent."""

    def __init__(self) -> None:
        self.captures: defaultdict[str, Capture] = defaultdict(lambda: Capture(1 << 30))

    def connect(self, address: str, **options: Any) -> Channel:
        return self.captures[address].connect(address, **options)

    def rows(self) -> dict[str, np.ndarray[Any, Any]]:
        """The different rows of each group: those that went to several workers, for their slices, count once."""
        found: defaultdict[str, set[bytes]] = defaultdict(set)
        for capture in self.captures.values():
            for sent in capture.messages:
                if isinstance(sent.message, Product) and sent.payloads is not None:
                    rows = np.frombuffer(sent.payloads[0], np.uint32).reshape(sent.message.rows, -1)
                    found[sent.message.group] |= {row.tobytes() for row in rows}
        return {group: np.array([np.frombuffer(row, np.uint32) for row in rows]) for group, rows in found.items()}


def test_a_node_that_is_killed_in_the_middle_costs_no_token_and_no_pad(
    cluster: Cluster, alone: list[tuple[int, ...]]
) -> None:
    before = cluster.wait_until(all_listen)
    nodes = raylets(cluster.directory)
    head = _head(nodes)
    lost = next(worker["node"] for worker in before["workers"] if worker["node"] != head)
    victims = [worker["pid"] for worker in before["workers"] if worker["node"] == lost]
    seen = Seen()
    with LLM(MODEL, protection="masked", worker=before["front"], connect=seen.connect) as llm:
        answers = asyncio.run(streams(llm, lambda: lose(nodes[lost], victims)))
        state = llm.worker_state
        assert state is not None
        assert (state.failed_checks, state.expelled) == (0, {})
    assert answers == alone
    rows = seen.rows()
    assert set(rows) == {"qkv", "o", "gate_up", "down", "lm_head"}
    assert not any(shared_pads([part]) for part in rows.values())
    after = cluster.wait_until(lambda workers: all_listen(workers) and all(one["node"] != lost for one in workers))
    assert after["epoch"] > before["epoch"]
    for old, new in zip(before["workers"], after["workers"], strict=True):
        moved = old["node"] == lost
        assert (new["restarts"] > old["restarts"], new["pid"] != old["pid"]) == (moved, moved)


def test_workers_that_come_and_go_cost_no_token(cluster: Cluster, alone: list[tuple[int, ...]]) -> None:
    before = cluster.wait_until(all_listen)
    with LLM(MODEL, protection="masked", worker=before["front"]) as llm:
        assert asyncio.run(streams(llm, lambda: cluster.run("scale", "--replicas", 1))) == alone
    with LLM(MODEL, protection="masked", worker=before["front"]) as llm:
        assert asyncio.run(streams(llm, lambda: cluster.run("scale", "--workers", 4))) == alone
    after = cluster.run("status")
    assert after["epoch"] > before["epoch"]
    assert [worker["shard"] for worker in after["workers"]] == [worker["shard"] for worker in before["workers"]]
    stayed = [worker["pid"] for worker in before["workers"][:2]]
    assert [worker["pid"] for worker in after["workers"][:2]] == stayed


def test_a_worker_that_ends_is_started_again(cluster: Cluster) -> None:
    before = cluster.wait_until(all_listen)["workers"][1]
    os.kill(before["pid"], signal.SIGKILL)
    again = cluster.wait_until(lambda workers: all_listen(workers) and workers[1]["restarts"] > before["restarts"])
    after = again["workers"][1]
    assert after["shard"] == before["shard"]
    assert after["pid"] != before["pid"]


def test_everything_listens_on_loopback_and_ray_wants_its_token(cluster: Cluster, tmp_path: Path) -> None:
    sockets = listening(processes(cluster.directory))
    assert len(sockets) > 8
    assert set(sockets.values()) <= set(LOOPBACK)
    ray = cluster.run("status")["ray"]
    own = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    assert _probe(ray, access(cluster.directory.token, own=True)) == ""
    assert "uthentication" in _probe(ray, {**own, "RAY_AUTH_MODE": "disabled"})
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    assert "uthentication" in _probe(ray, access(wrong, own=True))
    assert cluster.directory.token.stat().st_mode & 0o077 == 0


SPOKEN_TO = """
import sys, time
from pathlib import Path
from tsqp.cluster.connection import connected
from tsqp.cluster.state import ClusterDirectory
directory = ClusterDirectory("three", Path(sys.argv[1]))
with connected(directory, directory.read()):
    import ray._private.worker as worker
    from ray._private.utils import publish_error_to_driver
    printed, original = [], worker.print_worker_logs
    worker.print_worker_logs = lambda *given: printed.append(given) or original(*given)
    end = time.monotonic() + 60
    while not printed and time.monotonic() < end:
        publish_error_to_driver("node", "a node went", gcs_client=worker.global_worker.gcs_client)
        time.sleep(0.1)
print("printed" if printed else "silent")
"""


def test_what_ray_prints_of_its_nodes_is_no_part_of_a_commands_output(cluster: Cluster) -> None:
    environment = {**os.environ, **cluster.home.environment}
    command = [sys.executable, "-c", SPOKEN_TO, str(cluster.directory.path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout == "printed\n", done.stderr


def test_a_second_cluster_is_apart_and_down_leaves_nothing_of_it(cluster: Cluster) -> None:
    other = Cluster(cluster.home, "other")
    other.run("up", "--model", MODEL, "--threads", 1)
    directory = other.directory
    pids, ray_path = processes(directory), directory.ray_path(directory.read())
    sockets, shared = listening(pids), shared_memory(pids)
    assert sockets
    assert shared
    assert len(pids) > 5
    assert other.command("down").code == 0
    assert processes_of(directory.path, ray_path) == []
    assert not ray_path.exists()
    assert not any(name.startswith("other") for name in (path.name for path in directory.path.parent.iterdir()))
    assert not any(path.exists() for path in shared)
    assert not sockets.keys() & all_listening().keys()
    cluster.wait_until(all_listen)  # the first one was left alone


def _head(nodes: dict[str, int]) -> str:
    """The node that was started first has Ray's own processes beside it, and the registry."""
    return min(nodes, key=nodes.__getitem__)
