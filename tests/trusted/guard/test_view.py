"""What a worker sees in ``masked``: uniform noise, no pad twice; and these tests find one that is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import StartWorker
from tests.trusted.guard.honest import KEY, masked, small_weights
from tests.trusted.guard.runs import FEW, MODEL, PROMPT, open_llm, sent_rows, worker_that_can_go
from tests.trusted.guard.scan import WITHIN, shared_pads
from tsqp import SamplingParams, WorkerConfig
from tsqp.arith.expand import expand
from tsqp.arith.modulus import P
from tsqp.audit.capture import Capture, CapturedChannel
from tsqp.audit.uniformity import uniformity_p
from tsqp.audit.view import WordRows
from tsqp.errors import ChannelError, PadError, WorkerLost
from tsqp.trusted.guard import kernels, pads
from tsqp.trusted.guard.pads import PadBlock, Ratchet
from tsqp.trusted.guard.pool import PadPool

Array = np.ndarray[Any, np.dtype[Any]]

LEAST_P = 1e-6
ENOUGH = 10_000_000  # elements


def p_value(rows: list[Array], width: int) -> float:
    return uniformity_p(WordRows([np.concatenate([part.reshape(-1, width) for part in rows])], P))


def test_what_a_worker_gets_is_uniform(start_worker: StartWorker) -> None:
    capture = Capture(keep_bytes=1 << 27)
    with open_llm(start_worker(MODEL, dtype="field"), capture) as llm:
        while sum(rows.size for rows in sent_rows(capture)) < ENOUGH:
            llm.generate([PROMPT * 5] * 20, SamplingParams(max_tokens=1))
    assert p_value(sent_rows(capture), 64) > LEAST_P


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_fixed_input_is_as_uniform(value: float) -> None:
    """All zeros, and all at the limit: the least and the most that can be hidden."""
    linears, line = masked(small_weights(columns=2048, rows=8))
    x = torch.full((256, 2048), value)
    while len(line.sent) * x.numel() < ENOUGH:
        linears.start(KEY, x)
    assert p_value(line.sent, 2048) > LEAST_P
    assert not shared_pads(line.sent)


@pytest.mark.parametrize("fault", ["no pads", "half of the field", "a bit that never changes"])
def test_masks_that_are_not_uniform_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(stream: Any, out: Array) -> None:
        expand(stream, out)
        out &= np.uint32({"no pads": 0, "half of the field": 2**30 - 1}.get(fault, P - 1 - 2**4))

    monkeypatch.setattr(pads, "expand", changed)
    linears, line = masked(small_weights(columns=2048, rows=8))
    for _ in range(4):
        linears.start(KEY, torch.zeros(256, 2048))
    assert p_value(line.sent, 2048) < LEAST_P


def test_no_pad_is_used_twice_in_prefill_decode_and_two_connections(start_worker: StartWorker) -> None:
    worker, captures = start_worker(MODEL, dtype="field"), [Capture(), Capture()]
    with open_llm(worker, captures[0]) as one, open_llm(worker, captures[1]) as two:
        answers = [llm.generate(PROMPT, FEW)[0].token_ids for llm in (one, two, one)]
        one.generate([PROMPT, PROMPT[:7]], FEW)
    assert answers[0] == answers[1] == answers[2]
    rows = sent_rows(*captures)
    assert len({part.shape for part in rows}) > 4  # prompts and single tokens, of every group
    assert not shared_pads(rows)


def test_equal_seeds_do_not_make_equal_pads(start_worker: StartWorker) -> None:
    worker, captures, answers = start_worker(MODEL, dtype="field"), [Capture(), Capture()], []
    for capture in captures:
        torch.manual_seed(7)
        np.random.seed(7)
        with open_llm(worker, capture) as llm:
            answers += llm.generate(PROMPT, SamplingParams(max_tokens=4, temperature=1.0, seed=7, ignore_eos=True))
    assert answers[0] == answers[1]
    assert not shared_pads(sent_rows(*captures))


def test_no_pad_is_used_twice_after_a_worker_was_lost(start_worker: StartWorker) -> None:
    captures = [Capture(), Capture()]
    with worker_that_can_go() as (worker, go), open_llm(WorkerConfig(worker, patience_s=0), captures[0]) as llm:
        stream = llm.stream(PROMPT, FEW)
        next(stream)
        go()
        with pytest.raises(WorkerLost):
            list(stream)
        with pytest.raises((ChannelError, PadError)):
            llm.generate(PROMPT, FEW)
    with open_llm(start_worker(MODEL, dtype="field"), captures[1]) as llm:
        llm.generate(PROMPT, FEW)
    assert all(sent_rows(capture) for capture in captures)
    assert not shared_pads(sent_rows(*captures))


class Trap:
    """Puts itself in the place of functions, and raises KeyboardInterrupt once it has been armed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.left: int | None = None  # calls until it raises; None: never

    def lay(self, owner: Any, name: str, *, before: bool = False) -> None:
        real = getattr(owner, name)

        def trapped(*arguments: Any) -> Any:
            if before:
                self._spring()
            result = real(*arguments)
            if not before:
                self._spring()
            return result

        self._monkeypatch.setattr(owner, name, trapped)

    def _spring(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                self.left = None
                raise KeyboardInterrupt


STEPS: dict[str, Callable[[Trap], None]] = {
    "take": lambda trap: trap.lay(PadPool, "take"),
    "claim": lambda trap: trap.lay(PadBlock, "claim"),
    "expand": lambda trap: trap.lay(pads, "expand"),
    "mask": lambda trap: trap.lay(kernels, "quantise_and_mask"),
    "before it is sent": lambda trap: trap.lay(CapturedChannel, "send", before=True),
    "send": lambda trap: trap.lay(CapturedChannel, "send"),
    "supply": lambda trap: trap.lay(PadBlock, "supply"),
    "reply": lambda trap: trap.lay(CapturedChannel, "receive"),
    "check": lambda trap: trap.lay(kernels, "verify_and_unmask", before=True),
    "unmask": lambda trap: trap.lay(kernels, "verify_and_unmask"),
}


def record_written(monkeypatch: pytest.MonkeyPatch) -> list[Array]:
    """Every row that is written to memory of the line from now on, sent or not."""
    real, written = kernels.quantise_and_mask, []

    def send(*arguments: Any) -> None:
        real(*arguments)
        out = arguments[5][slice(*arguments[-2:])]
        written.append(out[out.any(axis=1)].copy())

    monkeypatch.setattr(kernels, "quantise_and_mask", send)
    return written


@pytest.mark.parametrize("calls", [1, 3, 12])
@pytest.mark.parametrize("step", STEPS)
def test_no_pad_is_used_twice_after_an_exception(
    step: str, calls: int, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, trap = record_written(monkeypatch), Trap(monkeypatch)
    STEPS[step](trap)
    worker, capture = start_worker(MODEL, dtype="field"), Capture()
    with open_llm(worker, capture) as llm:
        (expected,) = llm.generate(PROMPT, FEW)
        before = llm.session
        trap.left = calls
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPT, FEW)
        assert before is not None
        assert before.ended is not None  # whatever had been sent
        assert llm.generate(PROMPT, FEW) == [expected]
        assert llm.session is not before
    known = {row.tobytes() for part in written for row in part}
    assert all(row.tobytes() in known for part in sent_rows(capture) for row in part)
    assert not shared_pads(written)


def test_a_constant_key_is_found(start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ratchet, "next_key", lambda self: bytearray(range(32)))
    capture = Capture()
    with open_llm(start_worker(MODEL, dtype="field"), capture) as llm:
        llm.generate(PROMPT[:2], SamplingParams(max_tokens=1))
    rows = sent_rows(capture)
    first_of_call = np.cumsum([0, *(len(part) for part in rows)])[:-1].tolist()
    assert (first_of_call[0], first_of_call[1]) in shared_pads(rows)  # of two groups


def test_one_row_that_is_handed_out_again_is_found(start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second row of every block is masked like its first."""
    real = PadBlock.pads

    def again(self: PadBlock, first: int, rows: int, width: int, room: Array | None = None) -> Array:
        given = real(self, first, rows, width, room)
        if first == 0 and rows > 1:
            given[1] = given[0]
        return given

    monkeypatch.setattr(PadBlock, "pads", again)
    capture = Capture()
    with open_llm(start_worker(MODEL, dtype="field"), capture) as llm:
        llm.generate(PROMPT, SamplingParams(max_tokens=1))
    found = shared_pads(sent_rows(capture))
    assert (0, 1) in found
    assert (16, 17) in found
    assert (2, 3) not in found


@pytest.mark.parametrize("apart", [0, 1, WITHIN - 1, WITHIN])
def test_the_scan_finds_a_pad_under_any_two_inputs(apart: int) -> None:
    generator = np.random.default_rng(3)
    rows = generator.integers(0, P, (2000, 32), dtype=np.uint32)
    rows[0] = np.arange(32) * 1000  # so that the difference goes round the field
    signs = generator.choice([-1, 1], 32)
    rows[1999] = (rows[0].astype(np.int64) + signs * apart) % P
    assert shared_pads([rows[:700], rows[700:, :20]]) == [(0, 1999)]
    rows[1999, 19] = (int(rows[0, 19]) + WITHIN + 1) % P
    assert shared_pads([rows]) == []
