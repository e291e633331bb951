"""Runs of a private mode over shared memory, whose decode steps are taken as one compiled loop or the plain way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from tests.families import random_tokens
from tests.trusted.guard.fakes import Array
from tests.trusted.guard.hostile import AnyProduct, Attack, HostileWorker, serving, store_of
from tsqp import LLM, ComputeConfig, WorkerConfig
from tsqp.api.config import GuardConfig, ProtectionName
from tsqp.config.dtype import PrivateKVDtype
from tsqp.model.batch import Batch
from tsqp.model.cache import KVCache
from tsqp.trusted import step_loops
from tsqp.trusted.decode_step import DecodeStep
from tsqp.wire.channel import Arrival, Frames, Listener

MODEL = "synthetic:tiny"
CALLS = 4 * 2 + 1  # of a step of a model of two layers
PAD_ROWS = 16  # of a block


class RecordingWorker(HostileWorker):
    """Keeps a copy of every product that it is asked for, as it arrived. ``every``: attacks each of them."""

    listener: Listener

    def __init__(self, model: str, attack: Attack | None = None, at: int = 0, *, every: bool = False) -> None:
        super().__init__(store_of(model), attack, at)
        self.seen: list[tuple[AnyProduct, bytes]] = []
        self.controls: list[int] = []  # the bytes of their control frames
        self._every = every

    def serve(self, listener: Listener) -> None:
        self.listener = listener
        super().serve(listener)

    def answer(self, arrival: Arrival) -> Frames | None:
        products, (x, *_) = self.products, [*arrival.frames.tensors, b""]
        payload = bytes(x)
        answer = super().answer(arrival)
        if self.products > products:
            self.seen.append((self.calls[-1], payload))
            self.controls.append(len(arrival.frames.control))
            if self._every:
                self.attacked = None
        return answer

    def rows(self, item: Any) -> list[Array]:
        """What was sent, (R, K) for each call."""
        return [np.frombuffer(x, item).reshape(call.rows, -1) for call, x in self.seen]  # type: ignore[union-attr]


@contextmanager
def opened(
    mode: ProtectionName,
    model: str = MODEL,
    *,
    attack: Attack | None = None,
    at: int = 0,
    every: bool = False,
    ahead: int = 0,
    refuse: bool = False,
    kv_dtype: PrivateKVDtype | None = None,
    deadline_s: float = 60.0,
    **compute: Any,
) -> Iterator[tuple[LLM, RecordingWorker]]:
    """A model whose worker is a thread behind a socket; ``ahead``: pads that are made ahead of time, for so many rows.

    Nothing is made ahead but by ``fill``.
    """
    worker = RecordingWorker(model, attack, at, every=every)
    options = GuardConfig(pads_ahead=ahead, pads_empty="refuse" if refuse else "wait") if mode == "masked" else None
    with (
        pytest.MonkeyPatch.context() as patch,
        serving(worker, "shm") as address,
    ):
        patch.setattr("tsqp.trusted.filler.PadFiller.start", lambda filler: None)
        with LLM(
            model,
            protection=mode,
            worker=WorkerConfig(address, deadline_s=deadline_s, patience_s=0),
            guard=options,
            compute=ComputeConfig(kv_dtype=kv_dtype, **compute),
        ) as llm:
            yield llm, worker


def fill(llm: LLM) -> None:
    """Make the pads that are to be made ahead of time."""
    assert llm.guard is not None
    assert llm.guard.filler is not None
    llm.guard.filler.fill()


def step_of(llm: LLM) -> DecodeStep:
    """What takes the steps of a run."""
    step = llm.engine.decoder._step  # type: ignore[attr-defined]
    assert isinstance(step, DecodeStep)
    return step


@contextmanager
def plain(llm: LLM) -> Iterator[None]:
    """All passes the plain way meanwhile."""
    decoder: Any = llm.engine.decoder
    step, decoder._step = decoder._step, None
    try:
        yield
    finally:
        decoder._step = step


class Taken:
    """Why the compiled loop has come back, each time from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.why: list[int] = []
        real = step_loops.decode

        def decode(board: Array, thread: int, at: Array, least: int, calls: Array, *others: Any) -> tuple[int, int]:
            arguments = board, thread, at, least, calls, *others
            if thread or at[step_loops.CALL] == len(calls):  # a helper; or no step: it is to be compiled
                return real(*arguments)
            self.why.append(-1)  # an interrupt is raised as soon as it is back in Python
            self.why[-1], size = real(*arguments)
            return self.why[-1], size

        monkeypatch.setattr(step_loops, "decode", decode)

    @property
    def own(self) -> list[int]:
        """The reasons of its own. That a worker was slow to answer, as any may be under load, is none."""
        return [why for why in self.why if why < step_loops.LINE]

    @property
    def steps(self) -> int:
        """Those that it has taken to their end."""
        return self.why.count(step_loops.OVER)


def caches(llm: LLM, lengths: Sequence[int], seed: int = 0) -> list[KVCache]:
    """Sequences that hold so many positions each, of random keys and values."""
    made = []
    for number, length in enumerate(lengths):
        cache: KVCache = llm.engine.decoder.new_cache()
        generator = torch.Generator().manual_seed(1000 * seed + number)
        for layer in range(llm.config.num_layers):
            for memory in cache.reserve(layer, length):
                memory[:, :length] = torch.randn(len(memory), length, memory.shape[2], generator=generator)
        cache.advance(length)
        made.append(cache)
    return made


def stepped(llm: LLM, sequences: Sequence[KVCache], seed: int = 0) -> torch.Tensor:
    """Logits of one decode step, (R, vocab_size), by a random token for each sequence."""
    tokens = random_tokens(len(sequences), seed)
    return llm.engine.run(Batch([[token] for token in tokens], sequences)).clone()


def beside(llm: LLM, sequences: Sequence[KVCache], rows: Sequence[int], seed: int = 0) -> torch.Tensor:
    """Logits of a pass that has so many rows of each sequence: one is a decode step, more are a part of a prompt.

    Those of decode steps are wanted, and of the last prompt.
    """
    tokens = [random_tokens(count, seed + number) for number, count in enumerate(rows)]
    firsts = [cache.length if count == 1 else 2**30 for cache, count in zip(sequences, rows, strict=True)]
    sampled = [count == 1 or number == len(rows) - 1 for number, count in enumerate(rows)]
    return llm.engine.run(Batch(tokens, sequences, sampled=sampled, first_steps=firsts)).clone()


def held(llm: LLM, sequences: Sequence[KVCache]) -> list[torch.Tensor]:
    """All keys and values of some sequences."""
    return [
        part.clone()
        for cache in sequences
        for layer in range(llm.config.num_layers)
        for part in cache.view(layer, 0, cache.length)
    ]


def same(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> bool:
    """Whether they have the same bits."""
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
