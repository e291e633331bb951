"""Every row is worked on once, and no thread is left behind whatever fails."""

from __future__ import annotations

import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.commands import LIMIT_S
from tsqp.arith import row_threads
from tsqp.arith.row_threads import PARTS, RowThreads


@pytest.fixture
def three() -> RowThreads:
    torch.set_num_threads(3)
    try:
        return RowThreads()
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 100, 101])
@pytest.mark.parametrize("least", [1, 2, 101, 1000])
def test_every_row_once(three: RowThreads, rows: int, least: int) -> None:
    seen = np.zeros(rows, np.int64)
    parts = []

    def work(out: np.ndarray, first: int, end: int) -> None:
        parts.append((first, end))
        out[first:end] += 1

    three.run(work, rows, seen, least=least)
    assert seen.tolist() == [1] * rows
    assert len(parts) <= 3 * PARTS
    if rows < max(2, least):
        assert len(parts) == 1


def test_few_rows_stay_on_this_thread(three: RowThreads) -> None:
    names: list[str] = []
    three.run(lambda first, end: names.append(threading.current_thread().name), 9, least=10)
    assert names == [threading.current_thread().name]


def test_many_rows_are_shared_out(three: RowThreads) -> None:
    together = threading.Barrier(3, timeout=LIMIT_S)  # three parts wait for each other: they run at once
    three.run(lambda first, end: together.wait(), 9, least=6)


def test_who_has_done_its_part_takes_another(three: RowThreads) -> None:
    """One thread is held up until all other parts are done."""
    held, others, done = threading.Lock(), threading.Event(), []

    def work(first: int, end: int) -> None:
        if held.acquire(blocking=False):
            assert others.wait(LIMIT_S)
        done.append(first)
        if len(done) == 11:
            others.set()

    three.run(work, 12, least=2)
    assert sorted(done) == list(range(12))


def test_nobody_waits_for_a_thread_that_has_not_begun(three: RowThreads) -> None:
    going_on = threading.Event()
    for _ in range(2):  # both other threads are busy for as long as the rows are worked on
        three._calls.put(SimpleNamespace(answer=going_on.wait))  # type: ignore[arg-type]
    seen = np.zeros(12, np.int64)
    names = set()

    def work(first: int, end: int) -> None:
        names.add(threading.current_thread().name)
        seen[first:end] += 1

    three.run(work, 12, least=2)
    assert seen.tolist() == [1] * 12
    assert names == {threading.current_thread().name}
    going_on.set()
    three.run(work, 12, least=2)  # what was asked for before is over
    assert seen.tolist() == [2] * 12


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_failure_is_raised_when_all_parts_have_ended(three: RowThreads, where: str) -> None:
    here, together, ended = threading.current_thread(), threading.Barrier(3, timeout=LIMIT_S), []

    def work(first: int, end: int) -> None:
        together.wait()
        if (threading.current_thread() is here) == (where == "here"):
            raise RuntimeError("no memory")
        threading.Event().wait(0.05)
        ended.append(first)

    with pytest.raises(RuntimeError, match="no memory"):
        three.run(work, 9, least=6)
    assert len(ended) == (2 if where == "here" else 1)


def test_after_a_failure_no_part_is_begun(three: RowThreads) -> None:
    begun = []

    def work(first: int, end: int) -> None:
        begun.append(first)
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        three.run(work, 12, least=2)
    assert len(begun) <= 3


def test_no_thread_keeps_memory_of_its_last_work(three: RowThreads) -> None:
    memory = np.zeros(1000)
    alive = weakref.ref(memory)
    three.run(lambda array, first, end: array[first:end].fill(1), 9, memory, least=2)
    assert memory.sum() == 9
    del memory
    assert alive() is None


def test_several_threads_may_ask_at_once(three: RowThreads) -> None:
    sums = np.zeros((4, 300))
    asking = [
        threading.Thread(
            target=three.run, args=(lambda row, first, end: row[first:end].fill(1), 300, row), kwargs={"least": 2}
        )
        for row in sums
    ]
    for one in asking:
        one.start()
    for one in asking:
        one.join()
    assert sums.sum() == 1200


def test_an_interrupt_waits_for_the_other_parts(three: RowThreads, monkeypatch: pytest.MonkeyPatch) -> None:
    """They write to memory of the caller."""
    here, together = threading.current_thread(), threading.Barrier(3, timeout=LIMIT_S)
    going_on, ended = threading.Event(), []

    def work(first: int, end: int) -> None:
        together.wait()
        if threading.current_thread() is not here:
            assert going_on.wait(LIMIT_S)
            ended.append(first)

    class Interrupted:
        """A lock whose first wait is interrupted."""

        def __init__(self) -> None:
            self._lock, self._waits = threading.Lock(), 0
            self.release = self._lock.release

        def acquire(self) -> None:
            self._waits += 1
            if self._waits == 2:  # the first is its maker's
                going_on.set()
                raise KeyboardInterrupt
            self._lock.acquire()

    monkeypatch.setattr(row_threads, "Lock", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        three.run(work, 9, least=6)
    assert len(ended) == 2
