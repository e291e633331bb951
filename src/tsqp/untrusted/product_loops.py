"""Prepared products as compiled code: what ``RowWork`` does of them, and threads that share one, without Python.

A product is a row of numbers: its loop, its sizes, and addresses of memory that its table keeps. Its columns are
multiplied by the loops that Python calls too, each column by itself, so the bits are the same.

Threads. Who has a product sets out its parts and wakes the others; each takes one part after another from one word,
``LEFT``. Only who has taken a part looks at the product, and its owner does not go on until every part is done, of
which ``PENDING`` keeps count. Who wakes up too late finds no part, and has looked at nothing.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

from tsqp.arith.atomic import add, load, replace, store
from tsqp.arith.digits import split
from tsqp.arith.jit import Loop, entry, kernel
from tsqp.arith.vnni import product_of_few as product_of_digits
from tsqp.arith.vnni import product_of_numbers
from tsqp.model.compiled_rows import product_of_few, product_of_one
from tsqp.wire.exchange import give_way, now

# Of a product, int64 (PRODUCT_NUMBERS,): addresses of the loop that splits x into digits, and of the one that does some
# columns, 0 where there is nothing to do; rows T, elements of a row K (bytes, of bfloat16), columns N; digits of an
# element, or 0; addresses of x, of the weights, of what is added to a column or taken away, and how much of that there
# is; the address of the product; in how many parts its columns are shared.
SPLIT, LOOP, ROWS, INNER, OUTER, DIGITS, X, WEIGHTS, ADDED, ADDED_COUNT, OUT, PARTS = range(12)
PRODUCT_NUMBERS = 12

# Of a crew, int64 (CREW_NUMBERS,), in lines of the cache that different threads write: parts that nobody has taken, and
# parts that are not done; addresses of the product and of room for its digits, helpers, whether they are to stop, and
# whether a part has failed; until when nobody spins; two semaphores: there is work, and it is done.
LEFT, PENDING, PRODUCT, ROOM, HELPERS, STOP, FAILED, REST_UNTIL, BEGUN, DONE = 0, 8, 16, 17, 18, 19, 20, 21, 24, 32
CREW_NUMBERS = 40

_WORD = np.int64(8)
_ZERO, _ONE = np.int64(0), np.int64(1)
# As those who wait for a call: ``transport/shm/spin.py``. Not imported from there: it is none of the SOURCES of
# ``arith/jit.py``, whose change has loops compiled anew.
_SPIN_NS, _CROWDED_NS, _REST_NS = np.int64(100_000), np.int64(200_000), np.int64(100_000_000)

_set_up: Any = types.ExternalFunction("sem_init", types.int32(types.intp, types.int32, types.uint32))
_post: Any = types.ExternalFunction("sem_post", types.int32(types.intp))
_wait: Any = types.ExternalFunction("sem_wait", types.int32(types.intp))
_try: Any = types.ExternalFunction("sem_trywait", types.int32(types.intp))


def _pointer_to(element: Any) -> Any:
    """What makes an address a pointer to such elements."""

    def typed(typing: Any, address: Any) -> Any:
        pointer = types.CPointer(element)

        def cast(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return builder.inttoptr(arguments[0], context.get_value_type(pointer))

        return pointer(types.int64), cast

    return intrinsic(typed)


_uint8: Any = _pointer_to(types.uint8)
_int8: Any = _pointer_to(types.int8)
_uint16: Any = _pointer_to(types.uint16)
_int16: Any = _pointer_to(types.int16)
_int32: Any = _pointer_to(types.int32)
_uint32: Any = _pointer_to(types.uint32)
_int64: Any = _pointer_to(types.int64)
_array: Any = carray


def _called_at(typing: Any, address: Any, product: Any, room: Any, first: Any, end: Any) -> Any:
    """What the loop at an address says of these columns."""

    def call(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        word = ir.IntType(64)
        loop = builder.inttoptr(arguments[0], ir.FunctionType(word, [word] * 4).as_pointer())
        return builder.call(loop, arguments[1:])

    return types.int64(*[types.int64] * 5), call


_call: Any = intrinsic(_called_at)


# What SPLIT and LOOP may be: of the address of a product and of room for its digits, columns ``first`` to ``end``; 0
# where there was no memory for that. They are compiled apart, each once, and only where there is work for them.


def split_loop(product, room, first, end):  # type: ignore[no-untyped-def]
    """Digits of x, to the room; columns play no part."""
    p = _array(_int64(product), (PRODUCT_NUMBERS,))
    rows, inner, count = p[ROWS], p[INNER], p[DIGITS]
    digits = _array(_uint8(room), (count, rows, inner))
    if count == 4:
        split(_array(_uint32(p[X]), (rows, inner)), digits, 0, rows)
    else:
        split(_array(_int16(p[X]), (rows, inner)), digits, 0, rows)
    return 1


def digits_loop(product, room, first, end):  # type: ignore[no-untyped-def]
    """Of numbers mod p or of 16 bits, whose digits lie in the room."""
    p = _array(_int64(product), (PRODUCT_NUMBERS,))
    rows, inner, outer = p[ROWS], p[INNER], p[OUTER]
    digits, out = _array(_uint8(room), (p[DIGITS] * rows, inner)), _array(_uint32(p[OUT]), (rows, outer))
    weights, offsets = _array(_int8(p[WEIGHTS]), (outer, inner)), _array(_int32(p[ADDED]), (outer,))
    try:
        product_of_digits(digits, weights, offsets, out, first, end)
    except Exception:
        return 0
    return 1


def one_row_loop(product, room, first, end):  # type: ignore[no-untyped-def]
    """Of one row of bfloat16."""
    p = _array(_int64(product), (PRODUCT_NUMBERS,))
    rows, inner, outer = p[ROWS], p[INNER], p[OUTER]
    x, weights = _array(_uint8(p[X]), (rows, inner)), _array(_uint8(p[WEIGHTS]), (outer, inner))
    bias, out = _array(_uint16(p[ADDED]), (p[ADDED_COUNT],)), _array(_uint16(p[OUT]), (rows, outer))
    try:
        product_of_one(x, weights, bias, out, first, end)
    except Exception:
        return 0
    return 1


def few_rows_loop(product, room, first, end):  # type: ignore[no-untyped-def]
    """Of some rows of bfloat16."""
    p = _array(_int64(product), (PRODUCT_NUMBERS,))
    rows, inner, outer = p[ROWS], p[INNER], p[OUTER]
    x, weights = _array(_uint8(p[X]), (rows, inner)), _array(_uint8(p[WEIGHTS]), (outer, inner))
    bias, out = _array(_uint16(p[ADDED]), (p[ADDED_COUNT],)), _array(_uint16(p[OUT]), (rows, outer))
    try:
        product_of_few(x, weights, bias, out, first, end)
    except Exception:
        return 0
    return 1


# By the loop of a ``RowWork``, the one that does the same here.
LOOPS: dict[Loop, Loop] = {
    product_of_numbers: digits_loop,
    product_of_one: one_row_loop,
    product_of_few: few_rows_loop,
}


@cache
def address_of(loop: Loop) -> int:
    """Where one of these loops is: compiled now, or before. For a processor that has its instruction."""
    return entry(loop, types.int64(*[types.int64] * 4))


@kernel
def _help(crew, begin):  # type: ignore[no-untyped-def]
    """Do parts as long as there are any; whether the last part of all to be done was one of these.

    crew int64 (CREW_NUMBERS,), ``begin`` its address.
    """
    last = False
    while True:
        left = load(begin + LEFT * _WORD)
        if left <= 0:
            return last
        if not replace(begin + LEFT * _WORD, left, left - 1):
            continue
        product = _array(_int64(crew[PRODUCT]), (PRODUCT_NUMBERS,))
        parts, outer = product[PARTS], product[OUTER]
        part = parts - left
        first, end = outer * part // parts, outer * (part + 1) // parts
        if not _call(product[LOOP], crew[PRODUCT], crew[ROOM], first, end):
            crew[FAILED] = _ONE
        last = add(begin + PENDING * _WORD, -_ONE) == 1


@kernel
def _await_others(crew, begin, clock):  # type: ignore[no-untyped-def]
    """Until another thread says that it has done the last part."""
    moment = now(clock)
    until = moment + _SPIN_NS if moment >= crew[REST_UNTIL] else moment
    while moment < until:
        if _try(begin + DONE * _WORD) == 0:
            return
        give_way()
        before, moment = moment, now(clock)
        if moment - before > _CROWDED_NS:  # others want this core: a sleeper is woken at once
            crew[REST_UNTIL] = moment + _REST_NS
            break
    while _wait(begin + DONE * _WORD) != 0:  # a signal may end it early
        pass


@kernel
def multiply(product, crew, clock):  # type: ignore[no-untyped-def]
    """Do a product; whether there was memory for it. Whatever has become of it, no thread looks at it any more."""
    parts, begin, where = product[PARTS], np.int64(crew.ctypes.data), np.int64(product.ctypes.data)
    if product[LOOP] == 0:
        return True
    if product[SPLIT]:
        _call(product[SPLIT], where, crew[ROOM], _ZERO, _ZERO)
    if parts == 1:
        return _call(product[LOOP], where, crew[ROOM], _ZERO, product[OUTER]) != 0
    crew[PRODUCT], crew[FAILED] = where, _ZERO
    store(begin + PENDING * _WORD, parts)
    store(begin + LEFT * _WORD, parts)  # from here on others may take them
    for _ in range(min(crew[HELPERS], parts - 1)):
        _post(begin + BEGUN * _WORD)
    if not _help(crew, begin):
        _await_others(crew, begin, clock)
    return crew[FAILED] == 0


@kernel
def set_up(crew):  # type: ignore[no-untyped-def]
    """Make the semaphores of a crew whose numbers are 0."""
    begin = np.int64(crew.ctypes.data)
    _set_up(begin + BEGUN * _WORD, np.int32(0), np.uint32(0))
    _set_up(begin + DONE * _WORD, np.int32(0), np.uint32(0))


@kernel
def helper(crew):  # type: ignore[no-untyped-def]
    """What every other thread of a crew does, until it is told to stop."""
    begin = np.int64(crew.ctypes.data)
    while load(begin + STOP * _WORD) == 0:
        if _wait(begin + BEGUN * _WORD) == 0 and _help(crew, begin):
            _post(begin + DONE * _WORD)


@kernel
def stop(crew):  # type: ignore[no-untyped-def]
    """Tell them to, while there is no product."""
    begin = np.int64(crew.ctypes.data)
    store(begin + STOP * _WORD, _ONE)
    for _ in range(crew[HELPERS]):
        _post(begin + BEGUN * _WORD)
