"""Every row is worked on once, and no thread is left behind whatever fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tsqp.arith.row_threads import RowThreads


@pytest.fixture
def three() -> Iterator[RowThreads]:
    torch.set_num_threads(3)
    try:
        threads = RowThreads()
    finally:
        torch.set_num_threads(1)
    yield threads
    threads._pool.shutdown()


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
    assert len(parts) <= 3


def test_few_rows_stay_on_this_thread(three: RowThreads) -> None:
    names: list[str] = []
    three.run(lambda first, end: names.append(threading.current_thread().name), 9, least=10)
    assert names == [threading.current_thread().name]


def test_many_rows_are_shared_out(three: RowThreads) -> None:
    together = threading.Barrier(3, timeout=10)  # each part waits for the others: they run at once
    three.run(lambda first, end: together.wait(), 9, least=2)


@pytest.mark.parametrize("failing", [0, 3, 6])
def test_a_failure_is_raised_when_all_parts_have_ended(three: RowThreads, failing: int) -> None:
    ended = []

    def work(first: int, end: int) -> None:
        if first == failing:
            raise RuntimeError("no memory")
        threading.Event().wait(0.05)
        ended.append(first)

    with pytest.raises(RuntimeError, match="no memory"):
        three.run(work, 9, least=2)
    assert sorted([*ended, failing]) == [0, 3, 6]
