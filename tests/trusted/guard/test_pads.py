"""The life of a pad: from entropy, by keys that lead nowhere back, to one use, to nothing."""

from __future__ import annotations

import linecache
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tests.trusted.guard.honest import KEY, OTHER, HonestConnection, activations, guarded, masked, small_weights
from tests.trusted.guard.scan import shared_pads
from tsqp.arith.expand import BLOCK_ROWS
from tsqp.arith.modulus import P
from tsqp.errors import ChannelClosed, PadReused, PadsExhausted
from tsqp.trusted.guard import kernels
from tsqp.trusted.guard.linears import MaskedLinears
from tsqp.trusted.guard.pads import PadBlock, Ratchet
from tsqp.trusted.guard.pool import PadPool
from tsqp.trusted.guard.sources import LocalPadSource

Array = np.ndarray[Any, np.dtype[Any]]

WEIGHTS = small_weights()
ROOT = bytes(range(100, 132))
ERASED = {kernels.ERASED}
GUARD = "/tsqp/trusted/guard/"


def key_stream(key: bytes, size: int) -> bytes:
    return Cipher(algorithms.AES(bytes(key)), modes.CTR(bytes(16))).encryptor().update(bytes(size))


def test_the_ratchet_by_an_independent_computation() -> None:
    ratchet, state = Ratchet(ROOT), ROOT
    memory = ratchet._state
    for _ in range(5):
        stream = key_stream(state, 64)
        state = stream[:32]
        assert ratchet.next_key() == stream[32:]
        assert memory is ratchet._state
        assert memory == state  # the earlier one is overwritten where it lay


def test_a_destroyed_ratchet_gives_no_key() -> None:
    ratchet = Ratchet(ROOT)
    memory = ratchet._state
    ratchet.destroy()
    assert memory == bytes(32)
    with pytest.raises(PadReused):
        ratchet.next_key()


def test_the_rows_of_a_block_by_an_independent_computation() -> None:
    words = np.frombuffer(key_stream(ROOT, 4 * BLOCK_ROWS * 48), "<u4") & (2**31 - 1)
    assert (words < P).all()  # of this key
    block = PadBlock(bytearray(ROOT))
    assert np.array_equal(block.pads(3, 13, 48), words.reshape(BLOCK_ROWS, 48)[3:])
    assert np.array_equal(block.pads(0, 3, 48), words.reshape(BLOCK_ROWS, 48)[:3])


def test_the_rows_of_a_block_in_memory_of_a_call() -> None:
    block, room = PadBlock(bytearray(ROOT)), np.zeros((BLOCK_ROWS, 48), np.uint32)
    given = block.pads(2, 3, 48, room)
    assert np.shares_memory(given, room)
    assert np.array_equal(room, PadBlock(bytearray(ROOT)).pads(0, BLOCK_ROWS, 48))
    block.erase(2, 3)
    assert set(given.flat) == ERASED


@pytest.mark.parametrize("where", [None, np.zeros((BLOCK_ROWS, 48), np.uint32)], ids=["its own", "a call's"])
def test_a_block_that_was_opened_is_not_opened_in_other_memory(where: Any) -> None:
    """Nothing would be written there: what happens to lie in it would pass for pads."""
    block = PadBlock(bytearray(ROOT))
    block.pads(0, 1, 48, where)
    with pytest.raises(PadReused):
        block.pads(0, BLOCK_ROWS, 48, np.zeros((BLOCK_ROWS, 48), np.uint32))


@pytest.mark.parametrize("opened_first", [True, False])
def test_a_key_is_overwritten_once_it_is_not_needed(opened_first: bool) -> None:
    key = bytearray(ROOT)
    block = PadBlock(key)
    steps: list[Callable[[], object]] = [
        lambda: block.pads(0, 1, 48),
        lambda: block.supply(np.zeros((BLOCK_ROWS, 40), np.uint32)),
    ]
    for step in steps if opened_first else reversed(steps):
        assert key == ROOT
        step()
    assert key == bytes(32)
    with pytest.raises(PadReused):
        block.key()


def test_a_key_is_gone_once_both_are_made_from_it() -> None:
    block = PadBlock(bytearray(ROOT))
    block.supply(np.zeros((BLOCK_ROWS, 40), np.uint32))
    copy = block.key()
    assert copy == ROOT
    assert copy is not block._key  # whoever asks wipes it
    block.pads(block.claim(1), 1, 40)
    with pytest.raises(PadReused):
        block.key()


def test_there_are_no_products_before_they_are_made() -> None:
    with pytest.raises(PadReused):
        PadBlock(bytearray(ROOT)).products(0, 1)


def test_a_destroyed_block_has_nothing() -> None:
    key = bytearray(ROOT)
    block = PadBlock(key)
    rows, products = block.pads(0, BLOCK_ROWS, 48), np.ones((BLOCK_ROWS, 40), np.uint32)
    block.supply(products)
    block.destroy()
    assert key == bytes(32)
    assert set(rows.flat) == set(products.flat) == ERASED
    with pytest.raises(PadReused):
        block.claim(1)


def test_a_destroyed_key_is_never_expanded() -> None:
    """All keys would be the same one: zeros."""
    block = PadBlock(bytearray(ROOT))
    block.destroy()
    with pytest.raises(PadReused):
        block.pads(0, 1, 48)


def test_a_call_that_is_closed_under_way_writes_nothing() -> None:
    """As by another thread: its key is zeros by then, and a pad expanded from that would be known to everyone."""
    linears, line = masked(WEIGHTS)
    memory = bytearray(4 * 48)

    def close_first(size: int) -> memoryview:
        linears.close()
        return memoryview(memory)

    line.memory = close_first
    with pytest.raises(PadReused):
        linears.start(KEY, activations(1))
    assert not any(memory)
    assert not line.sent


def test_closing_destroys_what_was_ready_and_what_is_used_in_part() -> None:
    linears, _ = masked(WEIGHTS)
    linears.pads.make(KEY, 2)
    linears.start(KEY, activations(3)).wait()
    blocks = list(linears.pads._stocks[KEY])
    arrays = [part for block in blocks for part in (block._pads, block._products) if part is not None]
    assert [block.left for block in blocks] == [13, 16]
    linears.close()
    assert not any(any(block._key) for block in blocks)
    assert all(set(part.flat) == ERASED for part in arrays)
    with pytest.raises(ChannelClosed):
        linears.start(KEY, activations(1))
    with pytest.raises(PadReused):
        linears.pads.take(KEY, 1)


def test_seeds_do_not_reach_pads() -> None:
    sent = []
    for _ in range(2):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        linears, line = masked(WEIGHTS)
        linears.start(KEY, activations(20))
        sent += line.sent
    assert not shared_pads(sent)


def test_a_restart_has_new_keys() -> None:
    code = (
        "import tests.cached_loops\nfrom tests.trusted.guard.honest import *\nlinears, line = masked(small_weights())\n"
        "linears.start(KEY, activations(1))\nprint(line.sent[0].tobytes().hex())"
    )
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    rows = [np.frombuffer(bytes.fromhex(run.communicate()[0].decode()), np.uint32)[None] for run in started]
    assert not shared_pads(rows)


@contextmanager
def interrupted_at(line: int) -> Iterator[Callable[[], bool]]:
    """Raises KeyboardInterrupt before that line, counted from 0, that the guard runs; whether it was reached."""
    left = line

    def enter(frame: FrameType, event: str, argument: object) -> Any:
        return trace if GUARD in frame.f_code.co_filename else None

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            # A signal is never handled between the body of a ``with`` and its end, where a trace is called too.
            if left <= -1 and not linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith(
                "with "
            ):
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield lambda: left < 0
    finally:
        sys.settrace(before)


class Watched:
    """Masked linear layers, and every row that was written where the worker can read it."""

    def __init__(self) -> None:
        self.linears, self.line = masked(WEIGHTS)
        self._memory: list[bytearray] = []
        self.line.memory = self._reserve

    def _reserve(self, size: int) -> memoryview:
        self._memory.append(bytearray(size))
        return memoryview(self._memory[-1])

    def written(self) -> Array:
        rows = np.concatenate([np.frombuffer(memory, np.uint32).reshape(-1, 48) for memory in self._memory])
        return rows[rows.any(axis=1)]


@pytest.mark.parametrize("rows", [1, 20])
def test_an_interrupt_at_any_line_returns_no_row(rows: int) -> None:
    """And leaves a session that is either as good as before, or dead."""
    x, dead = torch.zeros(rows, 48), 0
    for line in count():
        watched = Watched()
        linears = watched.linears
        linears.start(KEY, x).wait()  # the next call begins inside of a block
        with interrupted_at(line) as reached, suppress(KeyboardInterrupt):
            linears.start(KEY, x).wait()
        if watched.line.dead is None:
            for _ in range(2):
                assert not linears.start(KEY, x).wait().any()
        else:
            dead += 1
            assert isinstance(watched.line.dead, ChannelClosed)
            assert (linears.groups[KEY].projections == 1).all()
        assert not shared_pads([watched.written()])
        if not reached():
            break
    assert line > 50  # lines of the guard that one call runs
    assert 10 < dead < line


def test_an_interrupt_while_waiting_ends_the_session() -> None:
    linears, line = masked(WEIGHTS)
    pending = linears.start(KEY, activations(3))
    other = linears.start(OTHER, activations(3, 40))

    def interrupted() -> memoryview:
        raise KeyboardInterrupt

    pending.reply.wait = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        pending.wait()
    assert isinstance(line.dead, ChannelClosed)
    for group in linears.groups.values():
        assert (group.projections == 1).all()
    for later in (other.wait, lambda: linears.start(KEY, activations(1))):
        with pytest.raises((ChannelClosed, PadReused)):
            later()
    assert len(line.sent) == 2


@pytest.mark.parametrize("where", ["slot", "ask"])
def test_a_call_that_fails_before_it_is_sent(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it has pads nothing is lost; with them the session ends, and all pads with it."""
    linears, line = masked(WEIGHTS)
    linears.start(KEY, activations(1)).wait()

    def fail(*_: object) -> None:
        raise RuntimeError(where)

    with monkeypatch.context() as patch:
        patch.setattr(line, where, fail)
        with pytest.raises(RuntimeError, match=where):
            linears.start(KEY, activations(4))
    if where == "slot":
        (block,) = linears.pads._stocks[KEY]
        assert block.left == BLOCK_ROWS - 1
        linears.start(KEY, activations(2)).wait()
        return
    assert isinstance(line.dead, ChannelClosed)
    assert not linears.pads._stocks[KEY]
    with pytest.raises(ChannelClosed):
        linears.start(KEY, activations(2))


def test_pads_run_out_in_one_of_several_products_under_way() -> None:
    """The others would be given up, and their replies with them: the session ends."""
    groups, line = guarded(WEIGHTS), HonestConnection(WEIGHTS)
    linears = MaskedLinears(line, groups, PadPool(groups, LocalPadSource(), wait=False))
    with pytest.raises(PadsExhausted):
        linears.start(KEY, activations(1))
    linears.pads.make(KEY, 1)
    linears.start(KEY, activations(1)).wait()  # nothing was under way: it went on
    under_way = linears.start(KEY, activations(1))
    with pytest.raises(PadsExhausted):
        linears.start(KEY, activations(BLOCK_ROWS))
    for call in (under_way.wait, lambda: linears.start(KEY, activations(1))):
        with pytest.raises(ChannelClosed):
            call()


def test_pads_that_a_failed_call_had_to_itself_are_destroyed() -> None:
    """Nobody else refers to its blocks: what they still hold would stay in memory until that is used for another."""
    groups, line = guarded(WEIGHTS), HonestConnection(WEIGHTS)
    linears = MaskedLinears(line, groups, PadPool(groups, LocalPadSource(), wait=True))
    pending = linears.start(KEY, activations(BLOCK_ROWS))
    (pads,) = pending.slices
    assert pads.block is not None
    line.change = lambda reply: reply.fill(0)
    line.fail(ChannelClosed("gone"))
    with pytest.raises(ChannelClosed):
        pending.wait()
    assert not any(pads.block._key)
    for part in (pads.block._pads, pads.block._products):
        assert part is None or set(part.flat) == ERASED
