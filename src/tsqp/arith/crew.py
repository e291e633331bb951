"""Threads that share items of work within compiled code: for loops that have no time to come back to Python.

One thread leads. It says what is to be done and how many items there are, takes items itself, and waits until all are
done; only then does it say what is next. Helpers take items of whatever is to be done. Nobody waits for a helper that
has not taken an item, so one that has no core costs nothing. While there is nothing to share, helpers sleep.

Items are counted over the whole life of a board and never again from 0: a helper that comes late finds no item left,
and whoever has taken an item knows that what was said of it still holds.

The semaphore is POSIX's, of Linux with 64 bits. Tests: tests/arith/test_crew.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from tsqp.arith.atomic import add, load, replace, store
from tsqp.arith.jit import inline, kernel

# Of a board, int64 (BOARD_NUMBERS,): items taken, said and done, each on a cache line of its own; whether helpers are
# to look for items; whether all is over; what is to be done, of what, and its first item; helpers; a semaphore.
TAKEN, SAID, DONE, OPEN, OVER, WHAT, OF, BASE, HELPERS, _SEMAPHORE = 0, 16, 32, 48, 49, 64, 65, 66, 67, 80
BOARD_NUMBERS = 96

_ONE, _NOBODY = np.int64(1), np.int64(-1)

_give_way: Any = types.ExternalFunction("sched_yield", types.int32())
_prepare: Any = types.ExternalFunction("sem_init", types.int32(types.intp, types.int32, types.uint32))
_wake: Any = types.ExternalFunction("sem_post", types.int32(types.intp))
_sleep: Any = types.ExternalFunction("sem_wait", types.int32(types.intp))


def new_board(helpers: int) -> Any:
    """A board for one leader and so many helpers."""
    board = np.zeros(BOARD_NUMBERS, np.int64)
    board[HELPERS] = helpers
    _new(board)
    return board


@inline
def _at(board, place):  # type: ignore[no-untyped-def]
    """The address of a number of the board."""
    return board.ctypes.data + 8 * place


@kernel
def _new(board):  # type: ignore[no-untyped-def]
    _prepare(_at(board, _SEMAPHORE), np.int32(0), np.uint32(0))


@kernel
def say(board, what, of, count):  # type: ignore[no-untyped-def]
    """The leader says what ``count`` items are of. All that were said before are done."""
    board[WHAT], board[OF], board[BASE] = what, of, board[SAID]
    store(_at(board, SAID), board[SAID] + count)


@kernel
def take(board):  # type: ignore[no-untyped-def]
    """An item, counted from 0, of what was said last; -1 where there is none left. ``done`` is said of it."""
    while True:
        item = load(_at(board, TAKEN))
        if item >= load(_at(board, SAID)):
            return _NOBODY
        if replace(_at(board, TAKEN), item, item + _ONE):
            return item - board[BASE]


@kernel
def done(board):  # type: ignore[no-untyped-def]
    """Say that an item is done."""
    add(_at(board, DONE), _ONE)


@kernel
def wait(board):  # type: ignore[no-untyped-def]
    """The leader waits until all items are done."""
    while load(_at(board, DONE)) != board[SAID]:
        _give_way()


@kernel
def call_helpers(board):  # type: ignore[no-untyped-def]
    """The leader says that there are items soon."""
    store(_at(board, OPEN), _ONE)
    for _ in range(board[HELPERS]):
        _wake(_at(board, _SEMAPHORE))


@kernel
def send_away(board):  # type: ignore[no-untyped-def]
    """The leader says that there are none for a while."""
    store(_at(board, OPEN), np.int64(0))


@kernel
def dismiss(board):  # type: ignore[no-untyped-def]
    """The leader says that there are none any more."""
    store(_at(board, OVER), _ONE)
    send_away(board)
    for _ in range(board[HELPERS]):
        _wake(_at(board, _SEMAPHORE))


@kernel
def next_item(board):  # type: ignore[no-untyped-def]
    """A helper waits for an item; -1 once all is over."""
    while load(_at(board, OVER)) == 0:
        if load(_at(board, OPEN)) == 0:
            _sleep(_at(board, _SEMAPHORE))
            continue
        item = take(board)
        if item >= 0:
            return item
        _give_way()
    return _NOBODY
