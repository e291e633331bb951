"""Decode steps whose calls a worker answers in a loop, in every mode that has one, beside answers in Python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import pytest
import torch

from tests.families import FAMILIES, tiny_model
from tests.trusted.guard.hostile import serving
from tests.trusted.step_runs import caches, stepped
from tests.untrusted.patient_calls import PatientCalls
from tsqp import LLM, ComputeConfig
from tsqp.api.config import ProtectionName
from tsqp.arith.few_rows import FewRowsKernel
from tsqp.checkpoint import open_checkpoint
from tsqp.model.attention_tiles import HAS_DOT
from tsqp.trusted.stats import total
from tsqp.untrusted.store import WeightStore
from tsqp.untrusted.worker import Worker
from tsqp.wire.channel import Arrival, Frames

pytestmark = pytest.mark.skipif(not (FewRowsKernel.supported() and HAS_DOT), reason="no loops of few rows here")


class Counting(Worker):
    """Counts what it answers in Python, and how often its loop has waited in vain before that."""

    in_python = 0

    def __init__(self, store: WeightStore, calls: PatientCalls | None) -> None:
        super().__init__(store, calls)
        self.calls = calls

    def counts(self) -> tuple[int, int]:
        return self.in_python, 0 if self.calls is None else self.calls.waited

    def answer(self, arrival: Arrival) -> Frames | None:
        self.in_python += 1
        return super().answer(arrival)


@contextmanager
def opened(mode: ProtectionName, model: str, *, compiled: bool) -> Iterator[tuple[LLM, Counting]]:
    with ExitStack() as stack:
        calls = stack.enter_context(closing(PatientCalls())) if compiled else None
        store = WeightStore(open_checkpoint(model), "bfloat16", torch.device("cpu"), kernel=FewRowsKernel())
        worker = Counting(store, calls)
        worker.prepare("float" if mode == "open" else "field")
        compute = ComputeConfig(dtype="bfloat16") if mode == "open" else ComputeConfig()
        address = stack.enter_context(serving(worker, "shm"))
        yield stack.enter_context(LLM(model, protection=mode, worker=address, compute=compute)), worker


@pytest.mark.parametrize("mode", ["masked", "verified", "open"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_same_bits_whoever_answers(family: str, mode: ProtectionName) -> None:
    model = str(tiny_model(family).directory)
    with opened(mode, model, compiled=True) as (ours, worker), opened(mode, model, compiled=False) as (theirs, other):
        for lengths in ([7], [0, 15, 3], [*range(16)]):
            one, two = caches(ours, lengths), caches(theirs, lengths)
            for step in range(3):
                before, (known, waited) = other.in_python, worker.counts()
                assert torch.equal(stepped(ours, one, step), stepped(theirs, two, step))
                calls, in_python = other.in_python - before, worker.in_python - known
                if mode != "open" and step:  # tiny models in floats have rows that the loops do not take
                    assert calls == 4 * ours.config.num_layers + 1
                    # The first may come after the loop has waited in vain, and each that it waits in vain for here.
                    assert in_python <= 1 + worker.counts()[1] - waited


def test_what_the_worker_says_it_computed_is_counted() -> None:
    model = str(tiny_model("llama").directory)
    with opened("verified", model, compiled=True) as (llm, worker):
        sequences: Any = caches(llm, [5])
        stepped(llm, sequences, 0)
        llm.stats.reset()
        before, waited = worker.counts()
        stepped(llm, sequences, 1)
        assert worker.in_python <= before + 1 + worker.counts()[1] - waited
        calls = total(llm.stats.calls.values())
        assert calls.count == 4 * llm.config.num_layers + 1
        assert 0 < calls.worker_s < calls.rpc_s
