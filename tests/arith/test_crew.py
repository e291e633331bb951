"""Threads that share items: each item is done once, by whoever; the leader sees all that was done, and waits for it."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqp.arith.bits import Array
from tsqp.arith.crew import (
    OF,
    WHAT,
    call_helpers,
    dismiss,
    done,
    new_board,
    next_item,
    say,
    send_away,
    take,
    wait,
)
from tsqp.arith.jit import kernel


@kernel
def _lead(board, tasks, called, works, seen):  # type: ignore[no-untyped-def]
    """tasks (n, 2): what, and how many items, which are added up in seen[task, item]; whether all were there in time.

    ``works``: the leader takes items too.
    """
    for task in range(len(tasks)):
        if called[task]:
            call_helpers(board)
        say(board, tasks[task, 0], task, tasks[task, 1])
        item = take(board) if works else -1
        while item >= 0:
            seen[task, item] += tasks[task, 0]
            done(board)
            item = take(board)
        wait(board)
        for item in range(tasks[task, 1]):
            if seen[task, item] != tasks[task, 0]:
                return False
        if called[task]:
            send_away(board)
    return True


@kernel
def _help(board, number, seen, by):  # type: ignore[no-untyped-def]
    """The same of a helper; by[task, item] is the number of who has done it."""
    item = next_item(board)
    while item >= 0:
        seen[board[OF], item] += board[WHAT]
        by[board[OF], item] = number
        done(board)
        item = next_item(board)


def run(tasks: Array, called: Array, helpers: int, *, works: bool = True, late: bool = False) -> tuple[Array, Array]:
    board = new_board(helpers)
    seen, by = (np.zeros((len(tasks), max(1, int(tasks[:, 1].max()))), np.int64) for _ in range(2))
    threads = [threading.Thread(target=_help, args=(board, number, seen, by)) for number in range(1, helpers + 1)]
    if not late:
        for thread in threads:
            thread.start()
    assert _lead(board, tasks, called, works, seen)
    dismiss(board)
    for thread in threads:
        if late:
            thread.start()
        thread.join()
    return seen, by


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 40), st.booleans()), min_size=1, max_size=30),
    st.integers(0, 3),
)
def test_each_item_is_done_once_before_the_next_task(tasks: list[tuple[int, int, bool]], helpers: int) -> None:
    numbers = np.array([task[:2] for task in tasks], np.int64)
    seen, _ = run(numbers, np.array([task[2] for task in tasks]), helpers)
    for task, (what, count) in enumerate(numbers):
        assert (seen[task, :count] == what).all()
        assert (seen[task, count:] == 0).all()


def test_the_leader_waits_for_what_helpers_do() -> None:
    tasks = np.full((50, 2), (3, 100), np.int64)
    _, by = run(tasks, np.ones(len(tasks), np.bool_), 2, works=False)
    assert set(by.ravel().tolist()) <= {1, 2}


def test_without_a_call_helpers_sleep() -> None:
    tasks = np.full((100, 2), (1, 1000), np.int64)
    _, by = run(tasks, np.zeros(len(tasks), np.bool_), 2)
    assert not by.any()


@pytest.mark.parametrize("helpers", [1, 3])
def test_helpers_that_come_when_all_is_over_find_nothing(helpers: int) -> None:
    tasks = np.full((5, 2), (2, 7), np.int64)
    _, by = run(tasks, np.ones(len(tasks), np.bool_), helpers, late=True)
    assert not by.any()
