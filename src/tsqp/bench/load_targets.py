"""What is put under load: our server in its modes, and peers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Protocol

from rich.console import Console

from tsqp.api.config import RunConfig
from tsqp.bench.arrivals import arrival_times, closed_loop, open_loop, prompts
from tsqp.bench.completions import CompletionsClient
from tsqp.bench.installed_peers import llama_cpp_peers, transformers_peer
from tsqp.bench.latency import SERVED, Answer, figures
from tsqp.bench.load_setup import LONGER, Load, server_options
from tsqp.bench.modes import MASKED
from tsqp.bench.peer import TransformersPeer
from tsqp.bench.progress import Steps
from tsqp.bench.server_process import ServerProcess, wait_for_pads
from tsqp.bench.workload import Workload


class Target(Protocol):
    """What answers many prompts at once."""

    name: str

    def at_once(self, streams: int, bar: Steps) -> dict[str, Any]:
        """The figures of so many clients, each of which waits for its answer before it asks again."""


class Server:
    """A server that is spoken to over HTTP."""

    def __init__(self, name: str, address: str, model: str, load: Load, more: dict[str, Any] | None = None) -> None:
        self.name = name
        self._address, self._model, self._more = address, model, more
        self._load = load
        self._prompts = prompts(load.tokens, load.seed)
        self._most: int | None = None  # answers that what was made ahead is enough for

    def settle(self, bar: Steps) -> None:
        """Wait until all that is made ahead is there, so that the server leaves the cores to what is measured next."""

    def _client(self, count: int) -> CompletionsClient:
        return CompletionsClient(self.name, self._address, self._model, count, self._more)

    def one(self, count: int) -> Answer:
        """One answer of ``count`` tokens, with nothing beside it."""

        async def asked() -> Answer:
            async with self._client(count) as client:
                return await client.ask(next(self._prompts), asyncio.get_running_loop().time())

        return asyncio.run(asked())

    def at_once(self, streams: int, bar: Steps) -> dict[str, Any]:
        """See Target.at_once."""
        bar.begin(f"{self.name}: {streams} at once")

        async def loop() -> dict[str, Any]:
            async with self._client(self._load.count) as client:
                return figures(*await closed_loop(client.ask, self._prompts, streams, self._load.seconds, self._most))

        found = asyncio.run(loop())
        self.settle(bar)
        return found

    def by_chance(self, rate: float, bar: Steps) -> dict[str, Any]:
        """The figures of requests that come ``rate`` times a second on average, whatever becomes of earlier ones."""
        bar.begin(f"{self.name}: {rate:.2g} requests a second")
        moments = arrival_times(rate, LONGER * self._load.seconds, self._load.seed)[: self._most]

        async def loop() -> dict[str, Any]:
            async with self._client(self._load.count) as client:
                return figures(*await open_loop(client.ask, self._prompts, moments))

        found = asyncio.run(loop())
        self.settle(bar)
        return {"asked_per_s": rate, **found}


class OurServer(Server):
    """``tsqp serve`` in one of its modes, in a process of its own. A context manager."""

    def __init__(self, run: RunConfig, mode: str, load: Load) -> None:
        self._process = ServerProcess(*server_options(run, mode, load))
        super().__init__(mode, self._process.address, self._process.model, load)
        self._masked = mode == MASKED
        self._most = load.answers_with_pads if self._masked else None
        self._made, self._made_s = 0.0, 0.0

    def settle(self, bar: Steps) -> None:
        """At ``masked``: wait until all pads are ready again."""
        if self._masked:
            bar.begin(f"{self.name}: makes pads")
            made, seconds = wait_for_pads(
                self._process.metrics,
                lambda ready, wanted: bar.begin(f"{self.name}: makes pads, {ready:.0f} of {wanted:.0f}"),
            )
            self._made += made
            self._made_s += seconds

    def pads(self) -> dict[str, float] | None:
        """How fast they were made while nothing else was done, and how many rows' were made on the spot."""
        if not self._masked:
            return None
        found = self._process.metrics()
        rate = self._made / self._made_s if self._made_s else 0.0
        return {"made_per_s": rate, "used": found["tsqp:pads_used_total"], "missed": found["tsqp:pads_missed_total"]}

    def __enter__(self) -> OurServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.close()


class Batches:
    """transformers, which has no server: batches of prompts, one after the other."""

    def __init__(self, peer: TransformersPeer, load: Load) -> None:
        self.name = f"{peer.name}, one batch, no server"
        self._peer = peer
        self._load = load
        self._prompts = prompts(load.tokens, load.seed)

    def at_once(self, streams: int, bar: Steps) -> dict[str, Any]:
        """See Target.at_once: a batch begins when the one before it has ended, by that process's clock alone."""
        bar.begin(f"{self.name}: {streams} at once")
        answers, now = list[Answer](), 0.0
        while now < self._load.seconds:
            batch = [next(self._prompts) for _ in range(streams)]
            first_s, more_s = self._peer.run_together(batch, self._load.steps)
            arrived = now + first_s, now + first_s + more_s
            answers += streams * [Answer(now, SERVED, arrived, self._load.count)]
            now = arrived[-1]
        return figures(answers, 0.0, now)


def peers(run: RunConfig, load: Load, stack: ExitStack, console: Console) -> Iterator[Target]:
    """Those that are installed and can have the model: llama.cpp's server, as in ``bench serve``, and transformers."""
    work = Workload(load.tokens, load.steps, load.runs)
    for peer in llama_cpp_peers(run, work, max(load.streams), stack, console):
        server = Server(peer.name, peer.address, "default", load, {"cache_prompt": False})
        server.one(load.count)  # its first answer takes longer
        yield server
    transformers = transformers_peer(run, stack, console)
    if transformers is not None:
        transformers.run([1] * load.tokens, 1)
        yield Batches(transformers, load)
