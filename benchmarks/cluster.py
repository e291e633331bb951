"""How long a cluster takes to be there, to be found, to go on after a lost node, to be whole again, and to be gone.

    python -m benchmarks.cluster [--runs 3] [--model default]

A Ray of three nodes on this machine, new for each run, and two halves of the columns with two workers each. Seconds:

``up_s``       `tsqp cluster up`, from the command to its end, when all four workers listen
``found_s``    the roster from the front, and connections to all workers, in this process
``pause_s``    eight answers are under way, a node is killed: the longest time that any of them then waited for a token
``steady_s``   the longest time that any of them had waited before that
``whole_s``    from the loss of the node until four workers are in the roster, and none of those that were on it
``scale_s``    `tsqp cluster scale`, two workers more
``restart_s``  from SIGKILL of a worker, which is its actor's end too, until the roster has another in its place
``down_s``     `tsqp cluster down`, until no process is left

``memory_gb`` is what all processes of the cluster have after ``up``, 10⁹ bytes: pages that several share count once
(PSS). The trusted side is not among them. A node is lost as a machine is that is switched off: its processes are killed
and say nothing. Medians of all runs, and under ``all`` each of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from tests.cluster.nodes import lose, processes, raylets

from benchmarks.machine import RESULTS, add_dirty_ok, check_tree, machine
from tsqp import LLM, AsyncLLM, ComputeConfig, SamplingParams
from tsqp.api.roster_place import RosterPlace
from tsqp.api.until import Until
from tsqp.checkpoint import open_checkpoint
from tsqp.cluster.own_ray import check_installed
from tsqp.cluster.state import ClusterDirectory
from tsqp.wire.transport import connect
from tsqp.wire.transport.front import find_roster, parse_roster_address

Result = TypeVar("Result")
NAME = "benchmark"
LIMIT_S = 300.0
LOOK_S = 0.02
STREAMS = 8
TOKENS, BEFORE = 40, 10  # of each answer; that all of them have when the node is lost
LAYOUT = ("--nodes", "3", "--columns", "2", "--replicas", "2")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--model", default="default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "cluster.json")
    add_dirty_ok(parser)
    options = parser.parse_args()
    check_tree(options)
    check_installed()
    with tempfile.TemporaryDirectory(prefix="tsqp-b") as runtime:  # mode 0700; sockets need a short path
        os.environ |= dict.fromkeys(("XDG_RUNTIME_DIR", "XDG_STATE_HOME"), runtime)
        runs = [one_run(options.model, options.threads) for _ in range(options.runs)]
    every = {name: [run[name] for run in runs] for name in runs[0]}
    medians = {name: statistics.median(values) for name, values in every.items()}
    about = {"layout": " ".join(LAYOUT), "streams": STREAMS, "threads": options.threads}
    result = {"benchmark": "cluster", "model": options.model, "runs": options.runs, **about, **medians, "all": every}
    load = {"load_average": os.getloadavg()[0], "machine": machine()}
    options.output.write_text(json.dumps({**result, **load}, indent=2) + "\n")
    print(", ".join(f"{name} {value:.2f}" for name, value in medians.items()) + f"; written to {options.output}")


def one_run(model: str, threads: int) -> dict[str, float]:
    """The figures of one cluster's life."""
    figures: dict[str, float] = {}
    try:
        front, figures["up_s"] = timed(
            lambda: cluster("up", "--model", model, "--threads", str(threads), *LAYOUT)["front"]
        )
        figures["memory_gb"] = sum(map(pss_bytes, processes(ClusterDirectory(NAME)))) / 1e9
        figures["found_s"] = found_s(front, model)
        figures |= node_lost(front, model, threads)
        view, figures["scale_s"] = timed(lambda: cluster("scale", "--replicas", "3"))
        gone = {view["workers"][0]["address"]}
        os.kill(view["workers"][0]["pid"], signal.SIGKILL)
        figures["restart_s"] = timed(lambda: wait_whole(front, len(view["workers"]), gone))[1]
    finally:
        figures["down_s"] = timed(lambda: command("down"))[1]
    return figures


def found_s(front: str, model: str) -> float:
    """Seconds to ask the front and to connect to each worker."""
    address, config = parse_roster_address(front), open_checkpoint(model).config
    place = RosterPlace(address, lambda: find_roster(address), lambda one, _: connect(one.address), lambda: config)
    begun = time.perf_counter()
    with ExitStack() as stack:
        for dialled in place.dial(Until()):
            stack.enter_context(closing(dialled.channel))
        return time.perf_counter() - begun


def node_lost(front: str, model: str, threads: int) -> dict[str, float]:
    """The node with most workers is killed under eight answers; not the first, where the front and Ray itself are."""
    workers = cluster("status")["workers"]
    nodes = raylets(ClusterDirectory(NAME))
    head = min(nodes, key=nodes.__getitem__)
    lost = statistics.mode(worker["node"] for worker in workers if worker["node"] != head)
    victims = [worker for worker in workers if worker["node"] == lost]
    at_s: list[float] = []

    def kill() -> None:
        lose(nodes[lost], [worker["pid"] for worker in victims])
        at_s.append(time.perf_counter())
        wait_whole(front, len(workers), {worker["address"] for worker in victims})
        at_s.append(time.perf_counter())

    with LLM(model, protection="masked", worker=front, compute=ComputeConfig(threads=threads)) as llm:
        times = asyncio.run(answers(llm, kill))
    killed_s, whole_s = at_s
    steady_s, pause_s = longest_waits(times, killed_s)
    return {"pause_s": pause_s, "steady_s": steady_s, "whole_s": whole_s - killed_s}


def longest_waits(times: list[list[float]], killed_s: float) -> tuple[float, float]:
    """Between two tokens of one answer: before a moment, and up to a token that came after it."""
    waits = [(now, now - last) for one in times for last, now in pairwise(one)]
    return max(wait for now, wait in waits if now <= killed_s), max(wait for now, wait in waits if now > killed_s)


async def answers(llm: LLM, kill: Callable[[], None]) -> list[list[float]]:
    """When each token of each answer came. ``kill`` is called once, on a thread, when all answers are under way."""
    times: list[list[float]] = [[] for _ in range(STREAMS)]
    under_way = asyncio.Event()

    async def one(model: AsyncLLM, number: int) -> None:
        prompt = list(range(10 + number, 42 + number))
        async for _ in model.stream(prompt, SamplingParams(max_tokens=TOKENS, ignore_eos=True)):
            times[number].append(time.perf_counter())
            if min(map(len, times)) >= BEFORE:
                under_way.set()

    async with AsyncLLM(llm) as model, asyncio.TaskGroup() as group:
        for number in range(STREAMS):
            group.create_task(one(model, number))
        await under_way.wait()
        await asyncio.to_thread(kill)
    return times


def wait_whole(front: str, count: int, gone: set[str]) -> None:
    """Until the roster has so many workers, and none at an address of those that are gone."""
    address, until = parse_roster_address(front), time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        there = {member.address for member in find_roster(address).workers}
        if len(there) == count and not there & gone:
            return
        time.sleep(LOOK_S)
    raise SystemExit("the cluster was not whole again")


def pss_bytes(pid: int) -> int:
    """Of one process; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """What it gives, and its seconds."""
    begun = time.perf_counter()
    return call(), time.perf_counter() - begun


def cluster(name: str, *options: str) -> dict[str, Any]:
    """What a command of ours shows."""
    return dict(json.loads(command(name, *options, "--json")))


def command(name: str, *options: str) -> str:
    """What a command of ours prints; `status` of a cluster that is not whole counts as well."""
    words = [sys.executable, "-m", "tsqp", "cluster", name, "--name", NAME, *options]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=name != "status", timeout=LIMIT_S)
    return done.stdout


if __name__ == "__main__":
    main()
