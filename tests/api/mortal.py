"""Workers on threads that die when they are told to, and the answers of streams that are open at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import torch

from tests.commands import LIMIT_S, wait_until
from tests.conftest import fresh_address
from tests.families import random_tokens
from tests.trusted.step_runs import RecordingWorker
from tsqp import LLM, Completion, SamplingParams
from tsqp.checkpoint import open_checkpoint
from tsqp.untrusted.store import WeightStore
from tsqp.untrusted.worker import Worker
from tsqp.wire.channel import Arrival, Frames, Listener
from tsqp.wire.transport import listen

MODEL = "synthetic:tiny"
PROMPTS = [random_tokens(length, seed=length) for length in (5, 23, 1, 40)]
PARAMS = [
    SamplingParams(max_tokens=12, ignore_eos=True),
    SamplingParams(max_tokens=9, ignore_eos=True, temperature=1.0, seed=3),
    SamplingParams(max_tokens=20, ignore_eos=True),
    SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.7, seed=8, logprobs=2),
]


class Mortal(Worker):
    """Dies of the calls with these numbers, counted through all of its lives: it has computed and says nothing."""

    listener: Listener

    def __init__(self, store: WeightStore, deaths: Sequence[int] = ()) -> None:
        super().__init__(store)
        self.deaths = sorted(deaths)
        self.asked = 0

    def serve(self, listener: Listener) -> None:
        self.listener = listener
        self._connections.clear()
        super().serve(listener)

    def answer(self, arrival: Arrival) -> Frames | None:
        answer = super().answer(arrival)
        number, self.asked = self.asked, self.asked + 1
        if self.deaths and number >= self.deaths[0]:
            self.deaths.pop(0)
            self.listener.interrupt()
            return None
        return answer


class MortalRecorder(Mortal, RecordingWorker):
    """The same for the private modes; it also keeps what it was sent."""

    def __init__(self, deaths: Sequence[int] = (), model: str = MODEL) -> None:
        RecordingWorker.__init__(self, model)
        self.deaths, self.asked = sorted(deaths), 0


def plain_worker(deaths: Sequence[int] = (), model: str = MODEL) -> Mortal:
    """One for mode ``open``, in float32."""
    store = WeightStore(open_checkpoint(model), "float32", torch.device("cpu"))
    store.prepare("float")
    return Mortal(store, deaths)


@contextmanager
def living(worker: Mortal, transport: str = "shm") -> Iterator[str]:
    """The address of a worker that is there again after each of its deaths."""
    address, over, listening = fresh_address(transport), threading.Event(), threading.Event()

    def live() -> None:
        while not over.is_set():
            with closing(listen(address)) as listener:
                worker.listener = listener
                listening.set()
                worker.serve(listener)

    def ended() -> bool:
        worker.listener.interrupt()  # again: after a death the next listener may be there a moment later
        thread.join(0.01)
        return not thread.is_alive()

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    assert listening.wait(LIMIT_S)
    try:
        yield address
    finally:
        over.set()
        wait_until(ended)


def answers(llm: LLM) -> list[Completion]:
    """The answers of all streams, which take turns."""
    streams = {number: llm.stream(*asked) for number, asked in enumerate(zip(PROMPTS, PARAMS, strict=True))}
    done: dict[int, Completion] = {}
    while streams:
        for number in list(streams):
            delta = next(streams[number])
            if delta.completion is not None:
                done[number] = delta.completion
                del streams[number]
    return [done[number] for number in range(len(PROMPTS))]
