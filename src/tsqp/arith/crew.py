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
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tsqp.arith.jit import kernel

# Of a board, int64 (BOARD_NUMBERS,): items taken, said and done, each on a cache line of its own; whether helpers are
# to look for items; whether all is over; what is to be done, of what, and its first item; helpers; a semaphore.
TAKEN, SAID, DONE, OPEN, OVER, WHAT, OF, BASE, HELPERS, _SEMAPHORE = 0, 16, 32, 48, 49, 64, 65, 66, 67, 80
BOARD_NUMBERS = 96

_ONE, _NOBODY = np.int64(1), np.int64(-1)
_I64 = ir.IntType(64)

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


def _place(context: Any, b: ir.IRBuilder, kind: Any, board: Any, at: Any) -> Any:
    return b.gep(context.make_array(kind)(context, b, board).data, [at])


def _typed_get(_context: Any, board: Any, at: Any) -> Any:
    """board[at], with all that was written before it was."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return b.load_atomic(_place(context, b, signature.args[0], *args), "acquire", 8)

    return types.int64(board, types.int64), emit


def _typed_put(_context: Any, board: Any, at: Any, value: Any) -> Any:
    """board[at] = value, after all that was written before."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        b.store_atomic(args[2], _place(context, b, signature.args[0], *args[:2]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(board, types.int64, types.int64), emit


def _typed_add(_context: Any, board: Any, at: Any, value: Any) -> Any:
    """board[at] += value, whoever else does the same."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        b.atomic_rmw("add", _place(context, b, signature.args[0], *args[:2]), args[2], "seq_cst")
        return context.get_dummy_value()

    return types.void(board, types.int64, types.int64), emit


def _typed_replace(_context: Any, board: Any, at: Any, old: Any, new: Any) -> Any:
    """board[at] = new if it is ``old``; whether it was."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        place = _place(context, b, signature.args[0], *args[:2])
        return b.extract_value(b.cmpxchg(place, args[2], args[3], "seq_cst", "seq_cst"), 1)

    return types.boolean(board, types.int64, types.int64, types.int64), emit


_get: Any = intrinsic(_typed_get)
_put: Any = intrinsic(_typed_put)
_add: Any = intrinsic(_typed_add)
_replace: Any = intrinsic(_typed_replace)


@kernel
def _new(board):  # type: ignore[no-untyped-def]
    _prepare(board[_SEMAPHORE:].ctypes.data, np.int32(0), np.uint32(0))


@kernel
def say(board, what, of, count):  # type: ignore[no-untyped-def]
    """The leader says what ``count`` items are of. All that were said before are done."""
    board[WHAT], board[OF], board[BASE] = what, of, board[SAID]
    _put(board, SAID, board[SAID] + count)


@kernel
def take(board):  # type: ignore[no-untyped-def]
    """An item, counted from 0, of what was said last; -1 where there is none left. ``done`` is said of it."""
    while True:
        item = _get(board, TAKEN)
        if item >= _get(board, SAID):
            return _NOBODY
        if _replace(board, TAKEN, item, item + _ONE):
            return item - board[BASE]


@kernel
def done(board):  # type: ignore[no-untyped-def]
    """Say that an item is done."""
    _add(board, DONE, _ONE)


@kernel
def wait(board):  # type: ignore[no-untyped-def]
    """The leader waits until all items are done."""
    while _get(board, DONE) != board[SAID]:
        _give_way()


@kernel
def call_helpers(board):  # type: ignore[no-untyped-def]
    """The leader says that there are items soon."""
    _put(board, OPEN, _ONE)
    for _ in range(board[HELPERS]):
        _wake(board[_SEMAPHORE:].ctypes.data)


@kernel
def send_away(board):  # type: ignore[no-untyped-def]
    """The leader says that there are none for a while."""
    _put(board, OPEN, np.int64(0))


@kernel
def dismiss(board):  # type: ignore[no-untyped-def]
    """The leader says that there are none any more."""
    _put(board, OVER, _ONE)
    send_away(board)
    for _ in range(board[HELPERS]):
        _wake(board[_SEMAPHORE:].ctypes.data)


@kernel
def next_item(board):  # type: ignore[no-untyped-def]
    """A helper waits for an item; -1 once all is over."""
    while _get(board, OVER) == 0:
        if _get(board, OPEN) == 0:
            _sleep(board[_SEMAPHORE:].ctypes.data)
            continue
        item = take(board)
        if item >= 0:
            return item
        _give_way()
    return _NOBODY
