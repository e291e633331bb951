"""What a worker sees of a compiled decode step: the calls of the plain way, and in ``masked`` fresh noise only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.families import random_tokens
from tests.trusted.guard.fakes import MODES, Array
from tests.trusted.guard.hostile import AnyProduct, HostileWorker, NotHereError
from tests.trusted.guard.scan import shared_pads
from tests.trusted.guard.secret_bytes import record
from tests.trusted.step_runs import CALLS, RecordingWorker, Taken, beside, caches, fill, opened, plain, stepped
from tsqp import LLM, SamplingParams
from tsqp.api.config import ProtectionName
from tsqp.arith.expand import expand
from tsqp.arith.modulus import P
from tsqp.trusted.guard import pads
from tsqp.trusted.guard.pads import Ratchet
from tsqp.wire.channel import Arrival
from tsqp.wire.messages import Product
from tsqp.wire.transport.shm.packets import decode_places

ROWS = (1, 3, 16, 5, 1)
FEW_ROWS = (1, 3)
PROMPT = (1, 1, 6)  # rows of two answers and of a prompt, whose last one has logits
STEPS = len(ROWS) + 1
FEW = SamplingParams(max_tokens=4, ignore_eos=True)
PAGE = 4096


def steps(llm: LLM, seed: int = 0, counts: tuple[int, ...] = ROWS) -> None:
    """Some steps, each of another count of rows, and one with a part of a prompt."""
    for number, rows in enumerate(counts):
        stepped(llm, caches(llm, [*range(3, 3 + rows)], seed), seed + number)
    beside(llm, caches(llm, [4, 9, 7], seed), PROMPT, seed)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    return Taken(monkeypatch)


@pytest.mark.parametrize("ahead", [0, 64], ids=["made on the spot", "made ahead"])
def test_a_row_is_its_digits_and_a_pad_of_its_own(ahead: int, taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    """``verified`` shows the digits, and the expansion of keys the pads."""
    expanded: set[bytes] = set()

    def noted(stream: Any, out: Array) -> None:
        expand(stream, out)
        expanded.update(row.tobytes() for row in out)

    with opened("verified") as (llm, in_clear):
        steps(llm)
    monkeypatch.setattr(pads, "expand", noted)
    with opened("masked", ahead=ahead) as (llm, worker):
        if ahead:
            fill(llm)
        steps(llm)
    assert taken.steps == 2 * STEPS
    used = list[bytes]()
    for masked, digits in zip(worker.rows(np.uint32), in_clear.rows(np.int16), strict=True):
        pad = (masked.astype(np.int64) - digits) % P
        used += [row.astype(np.uint32).tobytes() for row in pad]
    assert len(used) == (sum(ROWS) + sum(PROMPT)) * CALLS - (sum(PROMPT) - len(PROMPT))
    assert len(set(used)) == len(used)
    assert set(used) <= expanded


def test_no_pad_is_used_twice_in_prefills_and_steps_of_two_connections(taken: Taken) -> None:
    prompt, seen = random_tokens(21), []
    for _ in range(2):
        with opened("masked") as (llm, worker):
            llm.generate([prompt, prompt[:7]], FEW)
            with plain(llm):
                llm.generate(prompt, FEW)
            llm.generate(prompt, FEW)
            seen += worker.rows(np.uint32)
    assert taken.steps == 2 * 2 * 3
    assert not shared_pads(seen)


def test_no_pad_is_used_twice_after_a_step_that_failed(taken: Taken) -> None:
    """Of a session that goes on, and of rows that were written but not sent, too."""
    with opened("masked") as (llm, worker):
        places: list[Array] = []
        broken = caches(llm, [4, 5, 6])
        broken[2].view(1, 0, 4)[1][0, 2, 5] = float("nan")  # the second layer's attention, and nothing after it
        for sequences in (caches(llm, [4, 5, 6]), broken, caches(llm, [4, 5, 6])):
            try:
                stepped(llm, sequences)
            except Exception:
                step: Any = llm.engine.decoder._step  # type: ignore[attr-defined]
                memory = np.frombuffer(step._plans[3, 3].slot(5).tensor, np.uint32).reshape(3, -1).copy()
                places.append(memory[:2])  # those before the one that was refused
    assert taken.steps == 2
    assert len(worker.seen) == 2 * CALLS + 5
    assert len(places) == 1
    assert not shared_pads([*worker.rows(np.uint32), *places])


def test_a_constant_key_is_found(taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tests above could fail."""
    monkeypatch.setattr(Ratchet, "next_key", lambda self: bytearray(range(32)))
    with opened("masked") as (llm, worker):
        steps(llm)
    assert taken.steps == STEPS
    assert shared_pads(worker.rows(np.uint32))


@pytest.mark.parametrize("mode", MODES)
def test_the_calls_are_those_of_the_plain_way(mode: ProtectionName, taken: Taken) -> None:
    with opened(mode) as (llm, worker):
        steps(llm)
    with opened(mode) as (llm, reference), plain(llm):
        steps(llm)
    assert taken.steps == STEPS
    assert worker.calls == reference.calls
    assert all(isinstance(call, Product) for call in worker.calls)
    assert [len(payload) for _, payload in worker.seen] == [len(payload) for _, payload in reference.seen]
    if mode == "verified":
        assert worker.seen == reference.seen
    else:
        assert not {payload for _, payload in worker.seen} & {payload for _, payload in reference.seen}


def test_other_tokens_send_the_same_messages(taken: Taken) -> None:
    found = []
    for seed in (1, 2):
        with opened("masked") as (llm, worker):
            steps(llm, seed)
            found.append((worker.calls, worker.controls, [len(payload) for _, payload in worker.seen]))
    assert taken.steps == 2 * STEPS
    assert found[0] == found[1]


class ArenaView:
    """An attack that only looks: all of the arena that was ever in use, whenever a call arrives."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()  # each page with the one after it, so that no row is cut
        self._end = 0

    def __call__(self, worker: HostileWorker, call: AnyProduct, arrival: Arrival) -> None:
        tensors, product = decode_places(arrival.place)
        self._end = max(self._end, *(region.offset + region.size for region in (*tensors, product)))
        assert isinstance(worker, RecordingWorker)
        self.look(worker)
        raise NotHereError

    def look(self, worker: RecordingWorker) -> None:
        (connection,) = worker.listener._connections.values()  # type: ignore[attr-defined]
        memory = connection.memory
        assert memory is not None
        self.seen |= {bytes(memory[at : at + 2 * PAGE]) for at in range(0, self._end + 16 * PAGE, PAGE)}


@pytest.mark.parametrize("mode", MODES)
def test_the_arena_holds_no_secret(mode: ProtectionName, taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, digits and products are those of the same steps the plain way, where they can be recorded."""
    with monkeypatch.context() as patch, opened(mode) as (llm, _), plain(llm):
        found = record(patch)
        steps(llm, counts=FEW_ROWS)
        secrets = {name: found[name] for name in ("x", "xq", "product", "scales")}
    assert taken.steps == 0
    view, found = ArenaView(), record(monkeypatch)
    with opened(mode, attack=view) as (llm, worker):
        found.clear()  # of compiling the loops
        steps(llm, counts=FEW_ROWS)
        assert llm.guard is not None
        groups = llm.guard.linears.groups.values()
        vectors = [row.tobytes() for one in groups for part in (one.check_vectors, one.projections) for row in part]
        view.look(worker)
    assert taken.steps == len(FEW_ROWS) + 1
    assert not found["x"], "Python has seen a call"
    secrets |= {name: found[name] for name in ("pads", "products of pads", "keys")}
    secrets |= {"check vectors": vectors, "sent": [row.tobytes() for part in sent(worker, mode) for row in part]}
    arena = b"|".join(view.seen)
    there = {name for name, rows in secrets.items() if any(row in arena for row in set(rows))}
    assert all(row in arena for row in set(secrets["sent"]))  # this scan finds what is there
    if mode == "masked":
        assert all(secrets.values())
        assert there == {"sent"}
    else:
        assert there == {"sent", "xq", "product"}  # they are what crosses in this mode, and the scan finds them


def sent(worker: RecordingWorker, mode: ProtectionName) -> list[Array]:
    return worker.rows(np.uint32 if mode == "masked" else np.int16)
