"""The ORAM of embedding rows: right rows, and accesses that follow from sizes and drawn leaves alone."""

from __future__ import annotations

import random
import sys
from contextlib import suppress
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqp.model import oram, oram_loops
from tsqp.model.oram import Oram, _reversed
from tsqp.model.oram_loops import access, evict, new_position, put_back, put_in, take_out


def full(words: np.ndarray[Any, np.dtype[np.int64]]) -> Oram:
    memory = Oram(words)
    memory.fill()
    return memory


def test_it_is_filled_in_pieces_of_any_size() -> None:
    words = np.arange(60, dtype=np.int64).reshape(20, 3)
    memory = Oram(words)
    for most in (1, 7, 0, 11):
        memory.fill(most)
        assert not memory.filled
    memory.fill(7)
    assert memory.filled
    memory.fill()
    assert sorted(memory._ids[memory._ids >= 0].tolist()) == list(range(20))
    assert [memory.row(token).tolist() for token in range(20)] == words.tolist()


@settings(max_examples=25)
@given(st.integers(1, 150), st.integers(1, 5), st.data())
def test_every_access_gives_the_row(count: int, width: int, data: Any) -> None:
    words = np.random.default_rng(count).integers(-(2**63), 2**63 - 1, (count, width))
    memory = full(words)
    for token in data.draw(st.lists(st.integers(0, count - 1), max_size=40)):
        assert memory.row(token).tolist() == words[token].tolist()
    assert sorted(memory._ids[memory._ids >= 0].tolist()) == list(range(count)), "each row is there once"


def test_rows_are_in_the_stash_or_on_the_path_to_their_leaf_and_the_stash_stays_small() -> None:
    words = np.arange(2000, dtype=np.int64).reshape(1000, 2)
    memory, most = full(words), 0
    for turn in range(4000):
        memory.row(turn % 7 if turn % 2 else random.randrange(1000))
        most = max(most, memory.waiting())
    assert most < oram.STASH // 2
    for slot in np.flatnonzero(memory._ids >= 0):
        token = memory._ids[slot]
        assert memory._leaves[slot] == memory._positions[token]
        if slot >= oram.STASH:
            node = (slot - oram.STASH) // oram.PER_NODE + 1  # 1 for the root, as a heap is numbered
            leaf = (1 << memory.depth) + int(memory._leaves[slot])
            assert node == leaf >> (leaf.bit_length() - int(node).bit_length())


def test_a_full_stash_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oram, "STASH", 1)
    monkeypatch.setattr(oram, "EVICTIONS", 0)
    with pytest.raises(OverflowError, match="stash"):
        full(np.zeros((2, 1), np.int64))


def test_what_did_not_fit_into_the_stash_is_never_handed_out_as_zeros() -> None:
    memory, other = full(np.ones((8, 2), np.int64)), 1000
    stash = memory._ids[: oram.STASH]
    token = next(token for token in range(8) if token not in stash)
    stash[stash < 0] = other
    with pytest.raises(OverflowError, match="stash"):
        memory.row(token)
    memory._ids[memory._ids == other] = -1
    for _ in range(3):
        with pytest.raises(LookupError, match="row"):
            memory.row(token)
    assert memory.row(token ^ 1).tolist() == [1, 1]


class Interrupt:
    """A tracer that raises KeyboardInterrupt before the n-th instruction of the ORAM."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, frame: FrameType, event: str, argument: object) -> Interrupt | None:
        if frame.f_code.co_filename != oram.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return self


def test_an_access_that_is_interrupted_anywhere_loses_no_row() -> None:
    words = np.random.default_rng(0).integers(1, 9, (20, 3))
    memory, before = full(words), sys.gettrace()
    for at in range(1000):
        try:
            sys.settrace(Interrupt(at))
            memory.row(at % 20)
        except KeyboardInterrupt:
            sys.settrace(before)
            assert memory.row(at % 20).tolist() == words[at % 20].tolist()
        else:
            break
        finally:
            sys.settrace(before)
    assert 50 < at < 999, "every instruction was interrupted once, and then it was done"
    assert [memory.row(token).tolist() for token in range(20)] == words.tolist()


def test_each_access_draws_a_leaf_and_leaves_are_even() -> None:
    memory = full(np.zeros((64, 1), np.int64))
    seen = []
    for _ in range(3200):
        seen.append(int(memory._positions[5]))  # the path that the next access reads
        memory.row(5)
    counts = np.bincount(seen, minlength=1 << memory.depth)
    assert len(counts) == 32
    assert counts.min() > 50  # 100 ± 5 standard deviations of 10
    assert counts.max() < 150


def test_evictions_go_over_all_paths_in_turn() -> None:
    order = [_reversed(turn, 3) for turn in range(8)]
    assert order == [0, 4, 2, 6, 1, 5, 3, 7]


class Watched:
    """An array that writes down which elements are read and written."""

    def __init__(self, array: Any, seen: list[Any]) -> None:
        self.array, self.seen, self.shape = array, seen, array.shape

    def __getitem__(self, index: Any) -> Any:
        self.seen.append(("read", index))
        found = self.array[index]
        return Watched(found, self.seen) if isinstance(found, np.ndarray) else found

    def __setitem__(self, index: Any, value: Any) -> None:
        self.seen.append(("written", index))
        self.array[index] = value


def trace_of(token: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The accesses of one look-up as the source of the loops says them; the same leaves are read for every token."""
    draw = random.Random(seed)
    with monkeypatch.context() as patch:
        patch.setattr(oram, "STASH", 6)
        patch.setattr(Oram, "_drawn", lambda self: draw.randrange(1 << self.depth))
        words = np.arange(24, dtype=np.int64).reshape(12, 2)
        memory = full(words)
        for _ in range(5):
            memory.row(draw.randrange(12))
        memory._positions[token] = 0  # one leaf for all: what is watched is what comes of the token, not of the leaf
        seen: list[Any] = []
        for name in ("_ids", "_leaves", "_words", "_positions", "_held", "_room"):
            setattr(memory, name, Watched(getattr(memory, name), seen))
        for loop in (evict, new_position, put_back, put_in, take_out):
            patch.setattr(oram_loops, loop.__name__, loop.py_func)  # type: ignore[attr-defined]
        patch.setattr(oram, "access", access.py_func)  # type: ignore[attr-defined]
        for name in ("_mask", "_either", "_common_levels", "_bucket", "_move"):
            patch.setattr(oram_loops, name, getattr(oram_loops, name).py_func)
        with suppress(LookupError):  # the row may not lie on the path that is read
            memory.row(token)
        return seen


def test_a_look_up_touches_the_same_memory_whatever_the_token_and_wherever_rows_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traces = [trace_of(token, seed, monkeypatch) for token, seed in ((0, 1), (0, 2), (7, 3), (11, 4))]
    assert len(traces[0]) > 100
    assert all(one == traces[0] for one in traces)
