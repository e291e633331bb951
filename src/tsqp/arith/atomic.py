"""Words that several threads change, for compiled loops: each operation is one of the processor's, and a barrier.

An operation takes the address of an int64. What a thread has written before one of them, another sees after one of
them that has found its value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_WORD = ir.IntType(64)

Emit = Callable[..., Any]  # builder, pointer to the word, other arguments: the result


def _generator(emit: Emit) -> Callable[..., Any]:
    """What numba calls to write an operation, whose first argument is an address."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        word = builder.inttoptr(arguments[0], _WORD.as_pointer())
        result = emit(builder, word, *arguments[1:])
        return context.get_dummy_value() if signature.return_type == types.void else result

    return generate


def _load(_context: Any, address: Any) -> Any:
    return types.int64(types.int64), _generator(lambda builder, word: builder.load_atomic(word, "acquire", 8))


def _store(_context: Any, address: Any, value: Any) -> Any:
    def emit(builder: ir.IRBuilder, word: Any, value: Any) -> Any:
        return builder.store_atomic(value, word, "release", 8)

    return types.void(types.int64, types.int64), _generator(emit)


def _add(_context: Any, address: Any, value: Any) -> Any:
    def emit(builder: ir.IRBuilder, word: Any, value: Any) -> Any:
        return builder.atomic_rmw("add", word, value, "acq_rel")

    return types.int64(types.int64, types.int64), _generator(emit)


def _replace(_context: Any, address: Any, old: Any, new: Any) -> Any:
    def emit(builder: ir.IRBuilder, word: Any, old: Any, new: Any) -> Any:
        return builder.extract_value(builder.cmpxchg(word, old, new, "acq_rel", "acquire"), 1)

    return types.boolean(types.int64, types.int64, types.int64), _generator(emit)


load: Any = intrinsic(_load)  # the word
store: Any = intrinsic(_store)  # make it a value
add: Any = intrinsic(_add)  # add to it; what it was before
replace: Any = intrinsic(_replace)  # make it a second value if it is the first; whether it was
