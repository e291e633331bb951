"""The oblivious embedding: the look-up's bits, by memory accesses that no token changes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tsqp.model import oblivious_embedding
from tsqp.model.local import LocalEmbedding
from tsqp.model.oblivious_embedding import (
    TOGETHER,
    GrowingEmbedding,
    OramEmbedding,
    ScannedEmbedding,
    embedding_here,
    tree_bytes,
)
from tsqp.model.oblivious_loops import BLOCK, scan_rows
from tsqp.model.oram import Oram
from tsqp.trusted.stats import Stats

WAYS: tuple[Literal["scan", "oram"], ...] = ("scan", "oram")
SHAPES = st.sampled_from([(1, 4), (BLOCK - 1, 3), (BLOCK, 5), (3 * BLOCK + 7, 8), (200, 1)])


def table_of(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Every pattern of bits, those of infinities and of what is no number too."""
    size = torch.empty(0, dtype=dtype).element_size()
    drawn = torch.randint(0, 256, (shape[0], shape[1] * size), generator=torch.Generator().manual_seed(seed))
    return drawn.to(torch.uint8).view(dtype)


@given(SHAPES, st.sampled_from([torch.bfloat16, torch.float32, torch.float16]), st.data())
def test_rows_are_those_of_the_look_up_to_the_bit(shape: tuple[int, int], dtype: torch.dtype, data: Any) -> None:
    table = table_of(shape, dtype)
    several = st.lists(st.integers(0, shape[0] - 1), min_size=1, max_size=2 * TOGETHER + 1)
    tokens = torch.tensor(data.draw(several), dtype=data.draw(st.sampled_from([torch.int64, torch.int32])))
    expected = F.embedding(tokens.long(), table)
    for way in WAYS:
        found = embedding_here(table, Stats(), oblivious=True, way=way).start(tokens).wait()
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_rows_are_handed_out_in_the_dtype_that_was_asked_for() -> None:
    table = torch.randn(70, 6).bfloat16()
    tokens = torch.tensor([69, 0, 3])
    for oblivious in (True, False):
        found = embedding_here(table, Stats(), torch.float32, oblivious=oblivious).start(tokens).wait()
        assert torch.equal(found, table[tokens].float())
    assert isinstance(embedding_here(table, Stats(), oblivious=False), LocalEmbedding)


class HeldTree(Oram):
    """One that is filled no further than its first row until it may be."""

    may = threading.Event()

    def fill(self, most: int | None = None) -> None:
        if self._put:
            assert self.may.wait(20)
        super().fill(most)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    HeldTree.may = may = threading.Event()
    monkeypatch.setattr(oblivious_embedding, "Oram", HeldTree)
    yield may
    may.set()


def by_paths(embedding: GrowingEmbedding) -> bool:
    return isinstance(embedding._now, OramEmbedding)


def test_rows_are_the_same_while_a_tree_is_built_and_after(held: threading.Event) -> None:
    table, tokens = torch.randn(70, 6), torch.tensor([69, 0, 0, 3])
    growing = embedding_here(table, Stats(), oblivious=True, way="auto", room=4 * tree_bytes(table))
    assert isinstance(growing, GrowingEmbedding)
    assert not by_paths(growing)
    assert torch.equal(growing.start(tokens).wait(), table[tokens])
    held.set()
    growing._thread.join(20)
    assert by_paths(growing)
    assert torch.equal(growing.start(tokens).wait(), table[tokens])
    assert torch.equal(growing.start(torch.arange(70)).wait(), table)


def test_a_tree_that_cannot_be_built_leaves_passes_over_the_table(
    held: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    table = torch.randn(70, 6)
    growing = GrowingEmbedding(table, Stats())
    monkeypatch.setattr("tsqp.model.oram.put_back", lambda *_: False)
    held.set()
    growing._thread.join(20)
    assert not by_paths(growing)
    assert "could not be built" in caplog.text
    assert torch.equal(growing.start(torch.tensor([5])).wait(), table[5:6])


def test_a_tree_is_built_no_further_once_nobody_wants_it(held: threading.Event) -> None:
    closed, forgotten = GrowingEmbedding(torch.randn(70, 6), Stats()), GrowingEmbedding(torch.randn(70, 6), Stats())
    thread = forgotten._thread
    closed._stop.set()
    del forgotten
    held.set()
    closed.close()
    closed.close()
    thread.join(20)
    assert not thread.is_alive()
    assert not by_paths(closed)


@pytest.mark.parametrize("short", [1, None], ids=["a byte too little", "nobody knows"])
def test_without_memory_for_a_tree_there_is_none(short: int | None) -> None:
    table = torch.randn(70, 6)
    room = None if short is None else 4 * tree_bytes(table) - short
    assert isinstance(embedding_here(table, Stats(), oblivious=True, way="auto", room=room), ScannedEmbedding)


def test_the_memory_of_a_tree_is_what_it_takes() -> None:
    table = torch.randn(70, 5)
    tree = Oram(oblivious_embedding._words(table))
    assert tree._words.nbytes == tree_bytes(table)


class Watched:
    """An array that writes down which elements are read and written."""

    def __init__(self, array: Any, seen: list[tuple[str, Any]]) -> None:
        self.array, self.seen, self.shape = array, seen, array.shape

    def __getitem__(self, index: Any) -> Any:
        self.seen.append(("read", index))
        return self.array[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.seen.append(("written", index))
        self.array[index] = value


def trace_of(tokens: list[int]) -> list[tuple[str, Any]]:
    """The accesses of the loop as its source says them, in order."""
    table = np.arange(300, dtype=np.int64).reshape(100, 3)
    seen: list[tuple[str, Any]] = []
    out, masks = np.zeros((2, len(tokens), 3), np.int64), np.zeros((2, len(tokens), BLOCK), np.int64)
    loop: Any = scan_rows
    loop.py_func(*(Watched(one, seen) for one in (table, np.array(tokens), masks, out)), 0, 2)
    assert (out[0] | out[1]).tolist() == table[tokens].tolist()
    return seen


def test_two_prompts_of_equal_length_touch_the_same_memory() -> None:
    assert trace_of([0, 99, 5]) == trace_of([64, 64, 63])
    assert trace_of([0, 99, 5]) != trace_of([0, 99])


def test_a_plain_look_up_does_not() -> None:
    """So the watching sees what it is to see."""
    traces: list[list[tuple[str, Any]]] = [[], []]
    for tokens, seen in zip(([0, 99, 5], [64, 64, 63]), traces, strict=True):
        table = Watched(np.zeros((100, 3)), seen)
        for token in tokens:
            table[token]
    assert traces[0] != traces[1]


@pytest.mark.parametrize("count", [1, TOGETHER + 1])
def test_every_row_is_read_as_often_as_any_other(count: int) -> None:
    reads = [index[0] for how, index in trace_of([7] * count) if how == "read" and np.size(index) == 2]
    assert len(set(np.bincount(reads).tolist())) == 1
