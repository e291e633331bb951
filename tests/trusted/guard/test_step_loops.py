"""What of a compiled decode step is the guard's: rows masked into memory of the line, and a reply that is read once.

Each test runs twice: as the loops are compiled, and as they are written, where what they touch can be watched.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np
import pytest
import torch

from tests.trusted.guard.fakes import KEY, MODES, SHAPES, Array, expected_product, make_groups
from tsqp.arith.modulus import P
from tsqp.trusted import step_loops
from tsqp.trusted.guard import kernels

ROWS = 5
UNTOUCHED = 0x5A5A
COMPILED = hasattr(step_loops._mask, "py_func")


class Loops:
    """``mask`` and ``unmask``, and what they touch as they are written: addresses with bytes, and copies."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, as_written: bool) -> None:
        self.held: list[tuple[int, int]] = []
        self.copied: list[tuple[int, int, int]] = []
        self.as_written = as_written
        loops: tuple[Any, ...] = (step_loops._mask, step_loops._unmask, step_loops._all_good)
        if as_written:
            loops = tuple(getattr(loop, "py_func", loop) for loop in loops)
        self.mask, self.unmask, self.all_good = loops
        if as_written:
            monkeypatch.setattr(step_loops, "_held", self._hold)
            monkeypatch.setattr(step_loops, "_copy_once", self.copy)

    def _hold(self, address: int, like: Array, rows: int, width: int) -> Array:
        size = int(rows * width) * like.itemsize
        if not size:
            return np.empty((rows, width), like.dtype)
        self.held.append((int(address), size))
        memory: Any = (ctypes.c_char * size).from_address(int(address))
        return np.frombuffer(memory, like.dtype).reshape(rows, width)

    def copy(self, target: int, source: int, count: int) -> None:
        self.copied.append((int(target), int(source), int(count)))
        ctypes.memmove(int(target), int(source), int(count))


@pytest.fixture(params=[False, True], ids=["compiled", "as written"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Loops:
    return Loops(monkeypatch, as_written=request.param or not COMPILED)


class Call:
    """A call of R rows as ``decode_step`` lays it out; pads and products of each row are where they happen to be."""

    def __init__(self, mode: str, rows: int = ROWS, shape: tuple[int, int] = SHAPES[KEY], seed: int = 0) -> None:
        groups, weights = make_groups({KEY: shape}, seed=seed)
        self.group, self.wq, self.rows = groups[KEY], weights[KEY], rows
        self.weights = self.wq.numpy().astype(np.int64)
        self.masked, (outer, inner) = mode == "masked", shape
        generator = np.random.default_rng(seed)
        self.x = generator.standard_normal((rows, inner)).astype(np.float32)
        self.pads = [generator.integers(0, P, inner, dtype=np.uint32) for _ in range(rows)]
        self.products = [(pad.astype(np.int64) @ self.weights.T % P).astype(np.uint32) for pad in self.pads]
        self.given = [pad.copy() for pad in self.pads]
        self.memory = np.full((rows + 2, inner), UNTOUCHED, np.uint32 if self.masked else np.int16)
        self.replies = np.full((rows + 2, outer), UNTOUCHED, np.uint32)
        self.outs = np.full((rows + 2, outer), UNTOUCHED, np.float32)
        self.sent, self.reply, self.y = (one[1:-1] for one in (self.memory, self.replies, self.outs))
        self.private = np.empty(outer + 3, np.uint32)
        self.scales, self.verdicts = np.empty(rows, np.float32), np.full(rows, kernels.OK, np.uint8)
        self.expected = np.empty((rows, len(self.group.projections)), np.uint32)
        self.secrets = np.zeros((rows, 2), np.int64)
        if self.masked:
            for row, secrets in enumerate(zip(self.pads, self.products, strict=True)):
                self.secrets[row] = [secret.ctypes.data for secret in secrets]
        self.numbers = np.zeros(step_loops.CALL_NUMBERS, np.int64)
        for at, number in {
            step_loops.INNER: inner,
            step_loops.OUTER: outer,
            step_loops.SCALES: self.group.scales.ctypes.data,
            step_loops.BIAS: self.group.bias.ctypes.data,
            step_loops.VECTORS: self.group.check_vectors.ctypes.data,
            step_loops.PROJECTIONS: self.group.projections.ctypes.data,
            step_loops.BOUNDS: self.group.bounds.ctypes.data,
            step_loops.LIMIT: self.group.limit,
            step_loops.SENT: self.sent.ctypes.data,
            step_loops.REPLY: self.reply.ctypes.data,
        }.items():
            self.numbers[at] = number

    def mask(self, loops: Loops) -> bool:
        checks, item = self.expected.shape[1], np.zeros(1, self.memory.dtype)
        found = self.scales, self.expected, self.verdicts, 0, self.rows
        loops.mask(self.numbers, self.x, checks, self.masked, self.secrets, item, self.private, *found)
        return bool(loops.all_good(self.verdicts))

    def unmask(self, loops: Loops) -> bool:
        checks, found = self.expected.shape[1], (self.scales, self.expected, self.verdicts, 0, self.rows)
        secrets, word, private = self.secrets, self.private, self.private
        loops.unmask(self.numbers, self.y, checks, self.masked, secrets, word, private, *found)
        return bool(loops.all_good(self.verdicts))

    def answered(self, loops: Loops) -> Call:
        """The same call with its rows sent and the right reply."""
        assert self.mask(loops)
        self.reply[:] = self.sent.astype(np.int64) @ self.weights.T % P
        self.verdicts.fill(kernels.OK)
        return self

    @property
    def digits(self) -> Array:
        """The activations as integers, in int64."""
        sent = self.sent.astype(np.int64)
        if not self.masked:
            return sent
        centred: Array = (sent - np.stack(self.given)) % P
        return np.where(centred > P // 2, centred - P, centred)

    @property
    def projected(self) -> Array:
        """What the check is to find for the rows that were sent: their products by the projections mod p."""
        exact: Array = self.sent.astype(object) @ self.group.projections.T.astype(object) % P
        return exact.astype(np.uint32)

    @property
    def product(self) -> Array:
        """What is to come of it, float32 (R, N)."""
        return expected_product(self.group, self.wq, torch.from_numpy(self.x)).numpy()

    def secrets_left(self, row: int) -> bool:
        """Whether any number of the pads of a row, and of their product, is left."""
        return bool((self.pads[row] < P).any() or (self.products[row] < P).any())


def other(numbers: Array, column: int) -> None:
    """Another number below p in the place of one."""
    numbers[column] = 0 if numbers[column] else 1


# Masking


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 2, ROWS])
def test_every_row_is_sent_under_its_own_pad(loops: Loops, mode: str, rows: int) -> None:
    call = Call(mode, rows)
    assert call.mask(loops)
    limit = np.float32(call.group.limit)
    assert np.array_equal(call.scales, np.abs(call.x).max(axis=1) / limit)
    assert np.array_equal(call.digits, np.clip(np.round(call.x / call.scales[:, None]), -limit, limit))
    assert np.array_equal(call.expected, call.projected)
    assert (call.verdicts == kernels.OK).all()
    assert (call.memory[[0, -1]] == UNTOUCHED).all()
    if call.masked:
        assert all((pad == kernels.ERASED).all() for pad in call.pads)
    assert all(
        np.array_equal(one, pad @ call.weights.T % P) for one, pad in zip(call.products, call.given, strict=True)
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", range(ROWS))
def test_nothing_is_sent_with_a_row_that_is_no_numbers(loops: Loops, mode: str, row: int, bad: float) -> None:
    call = Call(mode)
    call.x[row, 7] = bad
    assert not call.mask(loops)
    assert call.verdicts[row] == kernels.NOT_FINITE
    assert (call.sent[row] == UNTOUCHED).all()


@pytest.mark.parametrize("column", [0, -1])
@pytest.mark.parametrize("row", range(ROWS))
def test_nothing_is_sent_with_a_row_whose_pad_was_used(loops: Loops, row: int, column: int) -> None:
    call = Call("masked")
    call.pads[row][column] = kernels.ERASED
    assert not call.mask(loops)
    assert call.verdicts[row] == kernels.ERASED_PAD
    assert (call.sent[row] == UNTOUCHED).all()


def test_pads_are_used_once(loops: Loops) -> None:
    call = Call("masked")
    assert call.mask(loops)
    call.memory.fill(UNTOUCHED)
    assert not call.mask(loops)
    assert (call.verdicts == kernels.ERASED_PAD).all()
    assert (call.memory == UNTOUCHED).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", ["quantise_and_mask", "verify_and_unmask"])
@pytest.mark.parametrize("skipped", range(ROWS))
def test_a_row_without_a_verdict_is_refused(
    mode: str, what: str, skipped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops, call, real, rows = Loops(monkeypatch, as_written=True), Call(mode), getattr(kernels, what), iter(range(ROWS))
    if what == "verify_and_unmask":
        call.answered(loops)

    def all_but_one(*arguments: Any) -> None:
        if next(rows) != skipped:
            real(*arguments)

    monkeypatch.setattr(step_loops, what, all_but_one)
    assert not (call.mask(loops) if what == "quantise_and_mask" else call.unmask(loops))
    assert call.verdicts[skipped] == kernels.UNSEEN


# Unmasking


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 2, ROWS])
def test_a_right_reply_is_the_product(loops: Loops, mode: str, rows: int) -> None:
    call = Call(mode, rows).answered(loops)
    reply = call.reply.copy()
    assert call.unmask(loops)
    assert np.array_equal(call.y, call.product)
    assert (call.verdicts == kernels.OK).all()
    assert np.array_equal(call.reply, reply), "memory of the line is not written to"
    assert (call.outs[[0, -1]] == UNTOUCHED).all()
    assert not call.masked or not any(call.secrets_left(row) for row in range(rows))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("column", [0, 11, -1])
@pytest.mark.parametrize("row", range(ROWS))
def test_a_wrong_row_is_found_and_nothing_is_made_of_it(loops: Loops, mode: str, row: int, column: int) -> None:
    call = Call(mode).answered(loops)
    other(call.reply[row], column)
    assert not call.unmask(loops)
    assert call.verdicts.tolist() == [kernels.MISMATCH if one == row else kernels.OK for one in range(ROWS)]
    assert (call.y[row] == UNTOUCHED).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("row", range(ROWS))
def test_another_way_to_write_a_number_is_out_of_range(loops: Loops, mode: str, row: int) -> None:
    call = Call(mode).answered(loops)
    call.reply[row, 3] += np.uint32(P)
    assert not call.unmask(loops)
    assert call.verdicts[row] == kernels.OUT_OF_RANGE
    assert (call.y[row] == UNTOUCHED).all()


@pytest.mark.parametrize("mode", MODES)
def test_rows_may_not_change_places(loops: Loops, mode: str) -> None:
    call = Call(mode).answered(loops)
    call.reply[[0, 1]] = call.reply[[1, 0]]
    assert not call.unmask(loops)
    assert call.verdicts.tolist() == [kernels.MISMATCH] * 2 + [kernels.OK] * (ROWS - 2)


@pytest.mark.parametrize("row", range(ROWS))
def test_products_of_pads_are_used_once(loops: Loops, row: int) -> None:
    call = Call("masked").answered(loops)
    call.products[row][-1] = kernels.ERASED
    assert not call.unmask(loops)
    assert call.verdicts[row] == kernels.ERASED_PAD
    assert (call.products[row] == kernels.ERASED).all()  # what lies in y then is nobody's: its verdict says so


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("blind", [0, 1])
def test_each_check_vector_counts(loops: Loops, mode: str, blind: int) -> None:
    call = Call(mode).answered(loops)
    a, b = (int(number) for number in call.group.check_vectors[blind, :2])
    call.reply[2, :2] = [(int(call.reply[2, 0]) + b) % P, (int(call.reply[2, 1]) - a) % P]  # 0 mod p to that vector
    assert not call.unmask(loops)
    assert call.verdicts[2] == kernels.MISMATCH


@pytest.mark.parametrize("mode", MODES)
def test_a_reply_is_read_once_into_private_memory(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever becomes of it afterwards."""
    loops = Loops(monkeypatch, as_written=True)
    call = Call(mode).answered(loops)
    copy, size = loops.copy, call.reply.shape[1] * 4

    def copy_and_spoil(target: int, source: int, count: int) -> None:
        copy(target, source, count)
        ctypes.memset(int(source), 0, int(count))

    monkeypatch.setattr(step_loops, "_copy_once", copy_and_spoil)
    loops.held.clear()
    assert call.unmask(loops)
    assert np.array_equal(call.y, call.product)
    first = call.reply.ctypes.data
    assert loops.copied == [(call.private.ctypes.data, first + row * size, size) for row in range(ROWS)]
    assert not [one for one in loops.held if first - one[1] < one[0] < first + ROWS * size]


@pytest.mark.parametrize("mode", MODES)
def test_memory_of_the_line_is_written_and_never_read_back(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the check is to find comes of private numbers, whatever the worker does to those that were sent."""
    loops, call = Loops(monkeypatch, as_written=True), Call(mode)
    real = kernels.quantise_and_mask

    def spoil(*arguments: Any) -> None:
        real(*arguments)
        call.memory.fill(3)

    monkeypatch.setattr(step_loops, "quantise_and_mask", spoil)
    untouched = Call(mode)
    assert call.mask(loops)
    assert untouched.mask(Loops(monkeypatch, as_written=True))
    untouched.group = call.group
    assert np.array_equal(call.expected, untouched.projected)


@pytest.mark.skipif(not COMPILED, reason="as it is compiled")
@pytest.mark.parametrize("mode", MODES)
def test_a_reply_that_never_stays_the_same_is_right_or_refused(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread changes one number of a row back and forth while the reply is copied, checked and rescaled."""
    loops = Loops(monkeypatch, as_written=False)
    verdicts = set()
    for seed in range(30):
        call = Call(mode, rows=40, shape=(2000, 16), seed=seed).answered(loops)
        stop, product = threading.Event(), call.product

        def scribble(reply: Array = call.reply, stop: threading.Event = stop) -> None:
            right, wrong = reply[:, 1000].copy(), np.zeros_like(reply[:, 1000])
            while not stop.is_set():
                reply[:, 1000] = wrong
                reply[:, 1000] = right

        thread = threading.Thread(target=scribble)
        thread.start()
        try:
            good = call.unmask(loops)
        finally:
            stop.set()
            thread.join()
        right = call.verdicts == kernels.OK
        assert good == right.all()
        assert np.array_equal(call.y[right], product[right])
        assert (call.y[~right] == UNTOUCHED).all()
        verdicts |= set(call.verdicts.tolist())
    assert verdicts <= {kernels.OK, kernels.MISMATCH}
