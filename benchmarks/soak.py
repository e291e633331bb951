"""A server under many requests for a while, most of them given up or wrong: nothing that it holds may grow.

    python -m benchmarks.soak [--minutes 30] [--given-up 10000] [--model default] [--kills 1] [--burst 200]

Starts `tsqp serve`, and sends bursts of requests of many kinds at once: streams that are read, streams and plain
requests that are given up at a random moment, several choices, forms, and requests that are wrong. After each burst
its clients go, the server is idle, its pads are ready again, and it is looked at: its own memory (RssAnon, once what
was freed has been given back: an allocator keeps now more and now less of it, by tens of megabytes), descriptors,
threads, segments of shared memory, and its metrics, which must add up. With ``--kills`` the worker is
killed so many times in each burst, under whatever runs: no stream may show it, and losses and reconnects must be as
many as the kills. Exit code 1, and a line for each, where something grew or does not add up.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tsqp.bench.child import Child

BURST = 200  # requests between two looks, unless told otherwise
AT_ONCE = 16
LEAST_LOOKS = 4  # fewer do not tell what grows
IDLE_LIMIT_S = 60.0  # from a burst's end until nothing runs or waits
LISTENING = "0A"  # a socket's state in /proc/net/tcp
GROWTH_BYTES = 8 << 20  # of memory in use, over the second half of the looks: pages that freed pieces lie in too
FREED_GROWTH_BYTES = 64 << 20  # of what an allocator keeps of freed memory
ERRORS = 2.0  # standard errors: where nothing grows, one run in forty says that memory does
KV_MEMORY = "64MiB"  # so that caches kept for conversations have their full size soon
WORDS = ["the", "of", "a", "river", "stone", "night", "answer", "machine", "seven", "wind", "list", "open"]

COUNTED = (  # once for each request that was added
    "tsqp:answers_begun_total",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:request_prompt_tokens_count",
    "vllm:request_generation_tokens_count",
)
HELD = ("tsqp:kv_bytes", "vllm:kv_cache_usage_perc")  # by running requests

Metrics = dict[str, float]


@dataclass(frozen=True)
class Look:
    """What an idle server holds."""

    anonymous_bytes: int
    descriptors: int
    threads: int
    segments: int
    freed_bytes: int = 0  # that it gave back to the system when it was told to


@dataclass
class Report:
    """What was asked, how it ended, and what was found at each look."""

    outcomes: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    looks: list[Look] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def verdict(self) -> list[str]:
        """What is wrong, a line each; empty for a server that holds."""
        return self.faults + growth(self.looks)


def growth(looks: Sequence[Look]) -> list[str]:
    """What grew between the second quarter of the looks and the last one, by more than ``tolerance`` says."""
    if len(looks) < LEAST_LOOKS:
        return [f"{len(looks)} looks are too few to tell: let it run longer"]
    quarter = len(looks) // 4
    early, late = looks[quarter : 2 * quarter], looks[-quarter:]
    found = []
    allowances = (
        ("anonymous_bytes", tolerance(looks)),
        ("freed_bytes", FREED_GROWTH_BYTES),
        ("descriptors", 2),
        ("threads", 2),
        ("segments", 0),
    )
    for name, allowed in allowances:
        before, after = (statistics.median(getattr(look, name) for look in part) for part in (early, late))
        if after > before + allowed:
            found.append(f"{name} grew from {before:.0f} to {after:.0f}")
    return found


def tolerance(looks: Sequence[Look]) -> float:
    """Bytes by which memory may differ between two quarters of the looks without having grown.

    After each kill an allocator lays out the same pads anew, and keeps more or less between them. How much is seen in
    the differences of looks that follow each other (their median is of the noise, also while memory grows). A median of
    n has an error of 1.25 of the noise by the root of n.
    """
    sizes = [look.anonymous_bytes for look in looks[len(looks) // 4 :]]
    steps = [abs(after - before) for before, after in pairwise(sizes)]
    noise = statistics.median(steps) * 1.4826 / math.sqrt(2)
    return max(GROWTH_BYTES, ERRORS * 1.25 * noise * math.sqrt(2 / (len(looks) // 4)))


def look_at(pid: int) -> Look:
    """Read from /proc what a process holds."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return Look(
        anonymous_bytes=int(status["RssAnon"].split()[0]) * 1024,
        descriptors=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        threads=int(status["Threads"]),
        segments=len(segments_of(Path(f"/proc/{pid}/maps").read_text())),
    )


def connections(pid: int, port: int) -> int:
    """How many connections of clients a process holds at one of its ports, open or not yet closed on its side.

    A server keeps an idle connection of HTTP for some seconds, so that descriptors tell nothing of a burst's requests
    until its clients have gone.
    """
    held = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since
            held.add(str(descriptor.readlink()))
    sockets = [line.split() for table in ("tcp", "tcp6") for line in _rows_of(Path(f"/proc/{pid}/net/{table}"))]
    here = [row for row in sockets if int(row[1].rpartition(":")[2], 16) == port and row[3] != LISTENING]
    return sum(f"socket:[{row[9]}]" in held for row in here)


def _rows_of(table: Path) -> list[str]:
    return table.read_text().splitlines()[1:] if table.exists() else []  # a host without IPv6 has no tcp6


def segments_of(maps: str) -> set[str]:
    """The memory that a process shares with others, by inode: arenas have no name in a file system, or one at first."""
    lines = (line.split(maxsplit=5) for line in maps.splitlines())
    shared = ("/memfd:tsqp-arena", "/dev/shm/")
    return {line[4] for line in lines if len(line) == 6 and (line[5].startswith(shared) or ".arena" in line[5])}


class Traffic:
    """Requests of many kinds, by chance but the same ones for the same seed."""

    def __init__(self, client: httpx.AsyncClient, model: str, seed: int, outcomes: Counter[str]) -> None:
        self._client = client
        self._model = model
        self._dice = random.Random(seed)
        self._outcomes = outcomes
        self.kinds = (self._read, self._left, self._left, self._left, self._whole, self._dropped, self._wrong)

    async def one(self) -> None:
        """One request, to its end or to ours."""
        kind = self._dice.choice(self.kinds)
        try:
            self._outcomes[await kind()] += 1
        except httpx.TransportError as error:
            self._outcomes[f"{type(error).__name__} of {kind.__name__}"] += 1

    def _body(self, **more: Any) -> dict[str, Any]:
        dice = self._dice
        text = " ".join(dice.choices(WORDS, k=dice.randint(1, 60)))
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": dice.randint(1, 24),
            "temperature": dice.choice((0, 0.7, 1.5)),
            "seed": dice.randrange(2**31),
        }
        extras: tuple[dict[str, Any], ...] = (
            {"n": 3},
            {"logprobs": True, "top_logprobs": 3},
            {"stop": ["a", "zz"]},
            {"presence_penalty": 1.0},
            {},
        )
        return {**body, **dice.choice(extras), **more}

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        async with self._client.stream("POST", "/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                yield f"status {answer.status_code}"
                return
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    yield line.removeprefix("data: ")

    async def _read(self) -> str:
        last = ""
        async for event in self._events(self._body(stream=True)):
            last = event
        return "streams read" if last == "[DONE]" else f"a stream ended with {last[:80]}"

    async def _left(self) -> str:
        after = self._dice.randint(0, 6)
        body = self._body(stream=True, max_tokens=200)
        events = self._events(body)
        try:
            async for _ in events:
                after -= 1
                if after <= 0:
                    break
        finally:
            await events.aclose()  # type: ignore[attr-defined]
        return "streams left"

    async def _whole(self) -> str:
        answer = await self._client.post("/chat/completions", json=self._body())
        return "answers" if answer.status_code == 200 else f"status {answer.status_code}"

    async def _dropped(self) -> str:
        request = self._client.post("/chat/completions", json=self._body(max_tokens=400))
        try:
            await asyncio.wait_for(request, self._dice.uniform(0.001, 0.1))
        except TimeoutError:
            return "requests dropped"
        return "answers"

    async def _wrong(self) -> str:
        wrong = (
            self._body(temperature=9),
            self._body(messages=[]),
            self._body(model="another"),
            self._body(messages=[{"role": "user", "content": "x " * 200_000}]),
            self._body(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 7}}}),
        )
        answer = await self._client.post("/chat/completions", json=self._dice.choice(wrong))
        return "refusals" if answer.status_code in (400, 404, 413) else f"status {answer.status_code} of a wrong one"


async def metrics_of(client: httpx.AsyncClient, address: str) -> Metrics:
    """Every sample without labels but the model's; those that have one more are summed."""
    found: Counter[str] = Counter()
    page = (await client.get(address)).raise_for_status()
    for family in text_string_to_metric_families(page.text):
        for sample in family.samples:
            found[sample.name] += sample.value  # type: ignore[assignment]
    return dict(found)


def inconsistent(metrics: Metrics) -> list[str]:
    """What does not add up, at any moment."""
    running, waiting = metrics["vllm:num_requests_running"], metrics["vllm:num_requests_waiting"]
    added, ended = metrics["tsqp:requests_added_total"], metrics["vllm:request_success_total"]
    found = [f"{name} is {value}" for name, value in metrics.items() if value < 0]
    if added != running + waiting + ended:
        found.append(f"{added:.0f} requests added, but {running:.0f} run, {waiting:.0f} wait, {ended:.0f} have ended")
    return found


def workers_of(pid: int) -> list[int]:
    """The processes that a server has started, whichever of its threads has."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found += map(int, (task / "children").read_text().split())
    return found


async def kill_worker(client: httpx.AsyncClient, metrics_address: str, pid: int, kills: int) -> list[str]:
    """Kill the worker once it is there, and wait until that is counted; ``kills`` were before. What went wrong."""
    until, killed = time.monotonic() + IDLE_LIMIT_S, False
    while time.monotonic() < until:
        metrics = await metrics_of(client, metrics_address)
        if killed and metrics["tsqp:worker_losses_total"] > kills:
            return []
        if not killed and metrics["tsqp:worker_up"] and metrics["tsqp:worker_losses_total"] == kills:
            for worker in workers_of(pid):
                os.kill(worker, signal.SIGKILL)
            killed = True
        await asyncio.sleep(0.02)
    return [f"{'no loss was counted' if killed else 'there was no worker'} for {IDLE_LIMIT_S:.0f} s"]


def miscounted(metrics: Metrics, kills: int) -> list[str]:
    """What an idle server counts wrongly of its workers, when so many were killed and nobody cheated."""
    losses, reconnects = (metrics.get(f"tsqp:worker_{name}_total", 0.0) for name in ("losses", "reconnects"))
    told = f"{kills} kills, {losses:.0f} losses, {reconnects:.0f} reconnects"
    found = [] if losses == reconnects == kills else [told]
    return found + (["a check has failed"] if metrics.get("tsqp:failed_checks_total") else [])


def unbalanced(metrics: Metrics) -> list[str]:
    """What does not add up while nothing runs or waits: endpoints and engine count the same answers and tokens."""
    added = metrics["tsqp:requests_added_total"]
    counted = {name: metrics.get(name, 0.0) for name in COUNTED}  # one with labels is there from its first answer on
    found = [f"{name} is {n:.0f}, and {added:.0f} requests were added" for name, n in counted.items() if n != added]
    found += [f"{name} is {metrics[name]} of an idle server" for name in HELD if metrics[name]]
    times = metrics["vllm:time_to_first_token_seconds_count"] + metrics["vllm:inter_token_latency_seconds_count"]
    least, most = metrics["vllm:request_generation_tokens_sum"], metrics["vllm:generation_tokens_total"]
    if not least <= times <= most:  # end tokens are measured and in no answer; who has left takes no more tokens
        found.append(f"{most:.0f} tokens were made, {times:.0f} measured, and answers have {least:.0f}")
    return found


@dataclass(frozen=True)
class Server:
    """A `tsqp serve` in a process that the soak may look into. ``address``: with the path of the endpoints."""

    address: str
    metrics_address: str
    model: str
    child: Child

    def look(self) -> Look:
        """What it holds: memory in use, and apart from it what was freed. Raises WorkerFailed where it has ended."""
        before = look_at(self.child.pid)
        self.child.ask({})
        after = look_at(self.child.pid)
        return replace(after, freed_bytes=max(0, before.anonymous_bytes - after.anonymous_bytes))


async def soak(
    server: Server,
    *,
    seconds: float = 0.0,
    given_up: int = 0,
    kills: int = 0,
    burst: int = BURST,
    seed: int = 1,
) -> Report:
    """Bursts for ``seconds`` and ``LEAST_LOOKS`` at least, and until ``given_up`` requests were given up.

    ``kills``: of the worker, in each burst of ``burst`` requests.
    """
    report, dice = Report(), random.Random(seed)
    metrics_address, pid = server.metrics_address, server.child.pid
    port = httpx.URL(server.address).port or 0
    until = time.monotonic() + seconds
    async with httpx.AsyncClient(timeout=120.0) as reader:
        while (
            time.monotonic() < until
            or len(report.looks) < LEAST_LOOKS
            or report.outcomes["streams left"] + report.outcomes["requests dropped"] < given_up
        ):
            places, one_kill = asyncio.Semaphore(AT_ONCE), asyncio.Lock()
            moments = set(dice.sample(range(burst), kills))  # of a kill: when so many requests have begun

            async def placed(places: asyncio.Semaphore, one_kill: asyncio.Lock, traffic: Traffic, kill: bool) -> None:
                async with places:
                    if kill:
                        async with one_kill:
                            report.faults += await kill_worker(reader, metrics_address, pid, report.kills)
                            report.kills += 1
                    await traffic.one()

            limits = httpx.Limits(max_connections=AT_ONCE)
            async with httpx.AsyncClient(base_url=server.address, timeout=120.0, limits=limits) as client:
                traffic = Traffic(client, server.model, dice.randrange(2**31), report.outcomes)
                await asyncio.gather(*(placed(places, one_kill, traffic, number in moments) for number in range(burst)))
            report.faults += inconsistent(await metrics_of(reader, metrics_address))
            report.faults += await idle(reader, metrics_address, report.kills)
            report.faults += await left_alone(pid, port)
            report.looks.append(server.look())
            if report.faults:
                break
    return report


async def left_alone(pid: int, port: int) -> list[str]:
    """Wait until the server holds no connection of clients, who have all gone. What was found instead."""
    until = time.monotonic() + IDLE_LIMIT_S
    while held := connections(pid, port):
        if time.monotonic() > until:
            return [f"{held} connections are held {IDLE_LIMIT_S:.0f} s after their clients"]
        await asyncio.sleep(0.02)
    return []


async def idle(client: httpx.AsyncClient, metrics_address: str, kills: int) -> list[str]:
    """Wait until nothing runs or waits, a worker and all pads are there and all adds up.

    What was found instead, after a while. Pads are most of the memory of a small model, so a look with half of them
    ready tells nothing.
    """
    until = time.monotonic() + IDLE_LIMIT_S
    while True:
        metrics = await metrics_of(client, metrics_address)
        busy = metrics["vllm:num_requests_running"] + metrics["vllm:num_requests_waiting"]
        wrong = miscounted(metrics, kills) + inconsistent(metrics) + unbalanced(metrics)
        filled = metrics.get("tsqp:pads_ready_prompt", 0.0) >= metrics.get("tsqp:pads_ahead", 0.0)
        if not busy and not wrong and filled and metrics.get("tsqp:worker_up", 1.0):
            return []
        if time.monotonic() > until:
            told = f"{busy:.0f} requests are still there {IDLE_LIMIT_S:.0f} s after their clients"
            return wrong or [f"{told}, or worker or pads are not"]
        await asyncio.sleep(0.02)


@contextmanager
def serving(*options: str, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """A server that is ready and ends with this script. Raises WorkerUnreachable where it does not start."""
    command = ("benchmarks.soak_server", "serve", "--json", "--port", "0", "--metrics-port", "0", *options)
    with Child(*command, environment=dict(os.environ) if environment is None else environment) as child:
        ready = child.ready
        yield Server(f"{child.address}/v1", ready["metrics_address"], ready["model"], child)


def main() -> None:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--given-up", type=int, default=0, help="go on until so many requests were given up")
    parser.add_argument("--model", default="default")
    parser.add_argument("--protection", default="masked")
    parser.add_argument("--kills", type=int, default=0, help="kills of the worker in each burst")
    parser.add_argument("--burst", type=int, default=BURST, help="requests between two looks")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    what = ("--model", options.model, "--protection", options.protection, "--kv-memory", KV_MEMORY)
    with serving(*what) as server:
        running = soak(
            server,
            seconds=60 * options.minutes,
            kills=options.kills,
            given_up=options.given_up,
            burst=options.burst,
            seed=options.seed,
        )
        report = asyncio.run(running)
    print(f"{len(report.looks):8d} bursts")
    for outcome, count in sorted(report.outcomes.items()):
        print(f"{count:8d} {outcome}")
    if options.kills:
        print(f"{report.kills:8d} kills of the worker")
    for look in report.looks[:: max(1, len(report.looks) // 20)]:
        print(look)
    if len(report.looks) >= LEAST_LOOKS:
        print(f"a growth of memory by less than {tolerance(report.looks) / 1e6:.0f} MB in half of the run is not seen")
    if wrong := report.verdict():
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
