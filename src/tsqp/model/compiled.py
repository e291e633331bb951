"""Loops that numba compiles; see ``kernels.py``, which also holds what each must equal.

Arrays are float32, or uint16 that hold bfloat16, rows first. Each function does rows ``first`` to ``end``; it releases
the interpreter lock, so that several threads can share the rows. Every intermediate that torch would round to bfloat16
is rounded here too, to nearest, ties to even.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numba import carray, types  # type: ignore[attr-defined]
from numba.extending import intrinsic, overload

from tsqp.arith.jit import inline, kernel
from tsqp.arith.loops import LEVELS, quantise_row

# Sums may be reordered, which vectorises them; nothing here may assume that numbers are finite.
_FAST = {"reassoc", "contract", "nsz"}
_kernel = partial(kernel, fastmath=_FAST)
_inline = partial(inline, fastmath=_FAST)

_ONE = np.float32(1.0)
_INFINITE = np.float32(np.inf)
_LEAST_POWER, _GREATEST_POWER = np.float32(-87.0), np.float32(88.0)
_BFLOAT16_HALF = np.uint32(0x7FFF)


def _widen(bits: Any) -> Any:
    """An element as float32."""
    raise NotImplementedError


def _narrow(value: Any, like: Any) -> Any:
    """float32 as an element of the type of ``like``; to bfloat16 ties go to even."""
    raise NotImplementedError


@intrinsic
def pointer(typing: Any, address: Any, like: Any) -> Any:
    """An address, int64, as a pointer to elements of the type of the array ``like``."""
    target = types.CPointer(like.dtype)

    def cast(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(target))

    return target(types.int64, like), cast


@overload(_widen, inline="always")
def _widen_as(bits):  # type: ignore[no-untyped-def]
    if isinstance(bits, types.Float):
        return lambda bits: bits
    return lambda bits: np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)  # the upper half of its bits


@overload(_narrow, inline="always")
def _narrow_as(value, like):  # type: ignore[no-untyped-def]
    if isinstance(like, types.Float):
        return lambda value, like: np.float32(value)

    def to_bfloat16(value, like):  # type: ignore[no-untyped-def]
        bits = np.float32(value).view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        return np.uint16(np.uint32(bits + _BFLOAT16_HALF + odd) >> np.uint32(16))

    return to_bfloat16


@_inline
def _round(value, like):  # type: ignore[no-untyped-def]
    """float32 to the nearest number that ``like`` can be, and back."""
    return _widen(_narrow(value, like))


@_inline
def _power(x):  # type: ignore[no-untyped-def]
    """e to the x for x from -87 to 88, float32 to about 1e-7 relative. A loop of the library's does not vectorise.

    Range reduction by multiples of ln 2 in two parts and a degree-5 polynomial, as in the Cephes library (Moshier).
    """
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32((p * r * r + r + _ONE) * power)


@_inline
def _exp(x):  # type: ignore[no-untyped-def]
    """e to any x, as good as 0 where it is smaller than e to the -87, infinity past e to the 88."""
    return _power(min(max(x, _LEAST_POWER), _GREATEST_POWER)) if x <= _GREATEST_POWER else _INFINITE


@_inline
def _norm_row(x, weight, eps, out, row):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for j in range(x.shape[1]):
        value = _widen(x[row, j])
        total += value * value
    scale = _ONE / np.sqrt(total / np.float32(x.shape[1]) + np.float32(eps))
    for j in range(x.shape[1]):
        out[row, j] = _narrow(_round(_widen(x[row, j]) * scale, weight[j]) * _widen(weight[j]), weight[j])


@_kernel
def rms_norm(x, weight, eps, out, first, end):  # type: ignore[no-untyped-def]
    """x (T, n), weight (n,), out (T, n)."""
    for row in range(first, end):
        _norm_row(x, weight, eps, out, row)


@_kernel
def add_rms_norm(hidden, y, weight, eps, out, first, end):  # type: ignore[no-untyped-def]
    """hidden, y, out (T, n), weight (n,); hidden becomes hidden + y."""
    for row in range(first, end):
        for j in range(hidden.shape[1]):
            hidden[row, j] = _narrow(_widen(hidden[row, j]) + _widen(y[row, j]), y[row, j])
        _norm_row(hidden, weight, eps, out, row)


@_kernel
def silu_mul(gate_up, out, first, end):  # type: ignore[no-untyped-def]
    """gate_up (T, 2·n), out (T, n)."""
    n = out.shape[1]
    for row in range(first, end):
        for j in range(n):
            gate, up = _widen(gate_up[row, j]), gate_up[row, n + j]
            out[row, j] = _narrow(_round(gate / (_ONE + _exp(-gate)), up) * _widen(up), up)


@_kernel
def relu_squared(up, out, first, end):  # type: ignore[no-untyped-def]
    """up, out (T, n)."""
    for row in range(first, end):
        for j in range(out.shape[1]):
            value = _widen(up[row, j])
            value = np.float32(0.0) if value < np.float32(0.0) else value  # what is no number stays so
            out[row, j] = _narrow(value * value, up[row, j])


@_kernel
def widen(x, out, first, end):  # type: ignore[no-untyped-def]
    """x (T, n), out float32 (T, n)."""
    for row in range(first, end):
        for j in range(x.shape[1]):
            out[row, j] = _widen(x[row, j])


@_inline
def _rotate_head(x, row, column, cos, sin, target):  # type: ignore[no-untyped-def]
    """One head of a row of x, from ``column`` on, rotated to target (d,)."""
    half = target.shape[0] // 2
    for j in range(half):
        low, high = _widen(x[row, column + j]), _widen(x[row, column + half + j])
        c, s = cos[row, j], sin[row, j]
        target[j] = _narrow(_round(low * _widen(c), c) - _round(high * _widen(s), s), target[j])
        c, s = cos[row, half + j], sin[row, half + j]
        target[half + j] = _narrow(_round(high * _widen(c), c) + _round(low * _widen(s), s), target[half + j])


@inline
def _sequence(table, n, row):  # type: ignore[no-untyped-def]
    """Whose row it is, ``n`` or later: the last sequence that begins at the row or before."""
    while n + 1 < len(table) and table[n + 1, 0] <= row:
        n += 1
    return n


@_kernel
def store(  # type: ignore[no-untyped-def]
    queries, query_column, keys, key_column, values, value_column, cos, sin, q, like, table, first, end
):
    """Rows of queries, rotated, to q (heads, T, d); of keys, rotated, and of values to caches as ``like`` is.

    Queries, keys and values (T, width) with heads from their columns on, cos and sin (T, d); caches (kv_heads,
    capacity, d). What is kept may be of another type, as a cache is that holds bfloat16 of float32. table int64 (n, 5),
    in the order of rows: a sequence's first row, the addresses of K and of V, the bytes from one of their heads to the
    next, and the first row's position. Its last row is the one before the next sequence's.
    """
    heads, d = like.shape[0], like.shape[2]
    n = 0
    for row in range(first, end):
        n = _sequence(table, n, row)
        place = (table[n, 4] + row - table[n, 0]) * d * like.itemsize
        for head in range(q.shape[0]):
            _rotate_head(queries, row, query_column + head * d, cos, sin, q[head, row])
        for head in range(heads):
            offset = head * table[n, 3] + place
            k = carray(pointer(table[n, 1] + offset, like), (d,))  # type: ignore[call-arg]
            v = carray(pointer(table[n, 2] + offset, like), (d,))
            _rotate_head(keys, row, key_column + head * d, cos, sin, k)
            for j in range(d):
                v[j] = _narrow(_widen(values[row, value_column + head * d + j]), v[j])


# Without leave to reorder sums, which would undo how the quantiser rounds.
@kernel
def _quantise(x, address, scale_address, like):  # type: ignore[no-untyped-def]
    """x float32 (n,) to integers and a scale at their addresses."""
    scale = carray(pointer(scale_address, x), (1,))  # type: ignore[call-arg]
    scale[0] = quantise_row(x, LEVELS, carray(pointer(address, like), x.shape))


@kernel
def store_int8(  # type: ignore[no-untyped-def]
    queries, query_column, keys, key_column, values, value_column, cos, sin, q, like, table, first, end
):
    """The same for caches of int8, q float32: table (n, 7) has the addresses of the scales of K and of V as well.

    They come before the position.
    """
    heads, d = like.shape[0], like.shape[2]
    rotated, plain = np.empty(d, np.float32), np.empty(d, np.float32)
    n = 0
    for row in range(first, end):
        n = _sequence(table, n, row)
        place = (table[n, 6] + row - table[n, 0]) * d
        for head in range(q.shape[0]):
            _rotate_head(queries, row, query_column + head * d, cos, sin, q[head, row])
        for head in range(heads):
            offset = head * table[n, 3] + place
            _rotate_head(keys, row, key_column + head * d, cos, sin, rotated)
            for j in range(d):
                plain[j] = _widen(values[row, value_column + head * d + j])
            of_scales = offset // d * rotated.itemsize
            _quantise(rotated, table[n, 1] + offset, table[n, 4] + of_scales, like)
            _quantise(plain, table[n, 2] + offset, table[n, 5] + of_scales, like)
