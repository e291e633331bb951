"""Teams of workers in this process, each with a shard, and runs that ask them."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch

from tests.commands import LIMIT_S
from tests.families import tiny_model
from tests.trusted.guard.hostile import AnyProduct, Attack, HostileWorker, serving
from tsqp import LLM, WorkerConfig
from tsqp.api.config import GuardConfig, ProtectionName
from tsqp.api.parties import Channels
from tsqp.api.places import Dialled, Place, Standing
from tsqp.api.plan import Plan
from tsqp.api.until import Until
from tsqp.audit.capture import Capture
from tsqp.checkpoint import open_checkpoint
from tsqp.config.shard import Shard
from tsqp.untrusted.store import WeightStore
from tsqp.wire.channel import Arrival, Frames, Listener

MODEL = str(tiny_model("llama").directory)  # two layers
PLACEMENTS = {
    "one": ["0..3"],
    "columns": ["0..3/0..1of2", "0..3/1..2of2"],
    "layers": ["0..1", "1..3"],
    "replicas": ["0..3", "0..3"],
    "uneven": ["0..3/0..1of5", "0..3/1..4of5", "0..3/4..5of5"],
    "more columns later": ["0..1", "1..3/0..1of3", "1..3/1..2of3", "1..3/2..3of3"],
    "mix": ["0..1/0..1of2", "0..1/1..2of2", "1..3/0..2of3", "1..3/2..3of3", "0..1/0..1of2"],
}


@cache
def store_of(shard: str) -> WeightStore:
    """What of the model a worker has, made once."""
    store = WeightStore(open_checkpoint(MODEL), "float32", torch.device("cpu"), shard=Shard.parse(shard))
    store.prepare("field")
    return store


class TeamWorker(HostileWorker):
    """Honest, but for one answer where there is an attack. ``go`` ends it, in the middle of a call or not."""

    listener: Listener

    def serve(self, listener: Listener) -> None:
        self.listener = listener
        try:
            super().serve(listener)
        finally:
            listener.close()

    def go(self) -> None:
        self.listener.interrupt()


class Stall:
    """An attack: one call is not answered before ``go``."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self, worker: HostileWorker, call: AnyProduct, arrival: Arrival) -> Frames:
        answer = worker.honest(arrival)
        assert self.go.wait(LIMIT_S)
        return answer


def goes(worker: HostileWorker, call: AnyProduct, arrival: Arrival) -> None:
    """An attack: the worker ends in the middle of a call, which it does not answer."""
    assert isinstance(worker, TeamWorker)
    worker.go()


@contextmanager
def at_work(shards: Sequence[str], attacks: Mapping[int, tuple[Attack, int]] | None = None) -> Iterator[Scene]:
    """Workers with these shards; ``attacks``: of some of them, by number, and from which call on."""
    with ExitStack() as stack:
        scene = Scene()
        for number, shard in enumerate(shards):
            worker = TeamWorker(store_of(shard), *(attacks or {}).get(number, (None, 0)))
            scene.workers.append(worker)
            scene.dialled.append((stack.enter_context(serving(worker)), shard, f"worker {number}"))
        yield scene


class Scene:
    """Workers, where they are, and what each was sent."""

    def __init__(self) -> None:
        self.workers: list[TeamWorker] = []
        self.dialled: list[tuple[str, str, str]] = []
        self.captures: defaultdict[str, Capture] = defaultdict(Capture)

    def address(self, number: int) -> str:
        return self.dialled[number][0]

    def connect(self, address: str, **options: Any) -> Any:
        return self.captures[address].connect(address, **options)

    def llm(self, mode: ProtectionName, *, deadline_s: float = LIMIT_S, patience_s: float = 0.0, **options: Any) -> LLM:
        """A run with all of them."""
        worker = WorkerConfig(self.address(0), deadline_s=deadline_s, patience_s=patience_s)
        guard = options.pop("guard", GuardConfig(pads_ahead=0) if mode == "masked" else None)

        def places(plan: Plan, model: str, channels: Channels) -> list[Place]:
            return [_TeamPlace(self, channels.to_worker)]

        with patch("tsqp.api.open_model.worker_places", places):
            return LLM(MODEL, protection=mode, worker=worker, guard=guard, connect=self.connect, **options)


class _TeamPlace(Standing):
    def __init__(self, scene: Scene, dial: Any) -> None:
        super().__init__("the team", dial)
        self._scene = scene

    def dial(self, until: Until) -> Sequence[Dialled]:
        return [
            Dialled(self._dial(address, None), Shard.parse(shard), name) for address, shard, name in self._scene.dialled
        ]
