"""Loops that numba compiles; see ``kernels.py``, which also holds what each must equal.

Arrays are float32, or uint16 that hold bfloat16, rows first. Each function does rows ``first`` to ``end``; it releases
the interpreter lock, so that several threads can share the rows. Every intermediate that torch would round to bfloat16
is rounded here too, to nearest, ties to even.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types  # type: ignore[attr-defined]
from numba.extending import intrinsic, overload

from tsqp.arith.jit import inline, kernel
from tsqp.arith.loops import LEVELS, quantise_row

# No loop has leave to reorder sums, or to round once where its source rounds twice. A loop is compiled alone and as a
# part of others, and which copy runs depends on what the process had loaded before: all have to round alike. Sums are
# written in lanes instead, which vectorises them.

_ONE = np.float32(1.0)
_INFINITE = np.float32(np.inf)
_LEAST_POWER, _GREATEST_POWER = np.float32(-87.0), np.float32(88.0)
_TWICE_GELU_SLOPE, _GELU_CUBE = np.float32(2 * (2 / np.pi) ** 0.5), np.float32(0.044715)
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


def _fused(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c of float32, rounded once where the processor can: a loop says where, and no compiler chooses."""

    def multiply_add(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        wide = ir.FloatType()
        function = builder.module.declare_intrinsic("llvm.fmuladd", [wide], ir.FunctionType(wide, [wide] * 3))
        return builder.call(function, arguments)

    return types.float32(types.float32, types.float32, types.float32), multiply_add


fused: Any = intrinsic(_fused)


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


@inline
def _round(value, like):  # type: ignore[no-untyped-def]
    """float32 to the nearest number that ``like`` can be, and back."""
    return _widen(_narrow(value, like))


@inline
def _power(x):  # type: ignore[no-untyped-def]
    """e to the x for x from -87 to 88, float32 to about 1e-7 relative. A loop of the library's does not vectorise.

    Range reduction by multiples of ln 2 in two parts and a degree-5 polynomial, as in the Cephes library (Moshier).
    """
    n = np.floor(fused(x, np.float32(1.4426950408889634), np.float32(0.5)))
    r = fused(n, np.float32(2.12194440e-4), fused(n, np.float32(-0.693359375), x))
    p = np.float32(1.9875691500e-4)
    p = fused(p, r, np.float32(1.3981999507e-3))
    p = fused(p, r, np.float32(8.3334519073e-3))
    p = fused(p, r, np.float32(4.1665795894e-2))
    p = fused(p, r, np.float32(1.6666665459e-1))
    p = fused(p, r, np.float32(5.0000001201e-1))
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32((fused(np.float32(p * r), r, r) + _ONE) * power)


@inline
def _exp(x):  # type: ignore[no-untyped-def]
    """e to any x, as good as 0 where it is smaller than e to the -87, infinity past e to the 88."""
    return _power(min(max(x, _LEAST_POWER), _GREATEST_POWER)) if x <= _GREATEST_POWER else _INFINITE


@inline
def _sum(x):  # type: ignore[no-untyped-def]
    """Of elements (n,), as float32, in eight lanes."""
    a = b = c = d = e = f = g = h = np.float32(0.0)
    whole = len(x) // 8 * 8
    for j in range(0, whole, 8):
        a += _widen(x[j])
        b += _widen(x[j + 1])
        c += _widen(x[j + 2])
        d += _widen(x[j + 3])
        e += _widen(x[j + 4])
        f += _widen(x[j + 5])
        g += _widen(x[j + 6])
        h += _widen(x[j + 7])
    for j in range(whole, len(x)):
        a += _widen(x[j])
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


@inline
def _sum_of_squares(x, mean):  # type: ignore[no-untyped-def]
    """Of what elements (n,) differ from ``mean``, as float32, in eight lanes."""
    a = b = c = d = e = f = g = h = np.float32(0.0)
    whole = len(x) // 8 * 8
    for j in range(0, whole, 8):
        a += (_widen(x[j]) - mean) * (_widen(x[j]) - mean)
        b += (_widen(x[j + 1]) - mean) * (_widen(x[j + 1]) - mean)
        c += (_widen(x[j + 2]) - mean) * (_widen(x[j + 2]) - mean)
        d += (_widen(x[j + 3]) - mean) * (_widen(x[j + 3]) - mean)
        e += (_widen(x[j + 4]) - mean) * (_widen(x[j + 4]) - mean)
        f += (_widen(x[j + 5]) - mean) * (_widen(x[j + 5]) - mean)
        g += (_widen(x[j + 6]) - mean) * (_widen(x[j + 6]) - mean)
        h += (_widen(x[j + 7]) - mean) * (_widen(x[j + 7]) - mean)
    for j in range(whole, len(x)):
        a += (_widen(x[j]) - mean) * (_widen(x[j]) - mean)
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


@inline
def _norm_row(x, weight, eps, out, row):  # type: ignore[no-untyped-def]
    total = _sum_of_squares(x[row], np.float32(0.0))
    scale = _ONE / np.sqrt(total / np.float32(x.shape[1]) + np.float32(eps))
    for j in range(x.shape[1]):
        out[row, j] = _narrow(_round(_widen(x[row, j]) * scale, weight[j]) * _widen(weight[j]), weight[j])


@kernel
def rms_norm(x, weight, eps, out, first, end):  # type: ignore[no-untyped-def]
    """x (T, n), weight (n,), out (T, n)."""
    for row in range(first, end):
        _norm_row(x, weight, eps, out, row)


@kernel
def add_rms_norm(hidden, y, weight, eps, out, first, end):  # type: ignore[no-untyped-def]
    """hidden, y, out (T, n), weight (n,); hidden becomes hidden + y."""
    for row in range(first, end):
        for j in range(hidden.shape[1]):
            hidden[row, j] = _narrow(_widen(hidden[row, j]) + _widen(y[row, j]), y[row, j])
        _norm_row(hidden, weight, eps, out, row)


@kernel
def layer_norm(x, weight, eps, out, first, end):  # type: ignore[no-untyped-def]
    """x (T, n), weight (n,), out (T, n)."""
    n = np.float32(x.shape[1])
    for row in range(first, end):
        mean = _sum(x[row]) / n
        scale = _ONE / np.sqrt(_sum_of_squares(x[row], mean) / n + np.float32(eps))
        for j in range(x.shape[1]):
            value = (_widen(x[row, j]) - mean) * scale
            out[row, j] = _narrow(_round(value, weight[j]) * _widen(weight[j]), weight[j])


@kernel
def silu_mul(gate_up, out, first, end):  # type: ignore[no-untyped-def]
    """gate_up (T, 2·n), out (T, n)."""
    n = out.shape[1]
    for row in range(first, end):
        for j in range(n):
            gate, up = _widen(gate_up[row, j]), gate_up[row, n + j]
            out[row, j] = _narrow(_round(gate / (_ONE + _exp(-gate)), up) * _widen(up), up)


@kernel
def gelu_mul(gate_up, out, first, end):  # type: ignore[no-untyped-def]
    """gate_up (T, 2·n), out (T, n); (1 + tanh u) / 2 is 1 / (1 + e to the -2u)."""
    n = out.shape[1]
    for row in range(first, end):
        for j in range(n):
            gate, up = _widen(gate_up[row, j]), gate_up[row, n + j]
            twice = _TWICE_GELU_SLOPE * (gate + _GELU_CUBE * (gate * gate * gate))
            out[row, j] = _narrow(_round(gate / (_ONE + _exp(-twice)), up) * _widen(up), up)


@kernel
def relu_squared(up, out, first, end):  # type: ignore[no-untyped-def]
    """up, out (T, n)."""
    for row in range(first, end):
        for j in range(out.shape[1]):
            value = _widen(up[row, j])
            value = np.float32(0.0) if value < np.float32(0.0) else value  # what is no number stays so
            out[row, j] = _narrow(value * value, up[row, j])


@kernel
def widen(x, out, first, end):  # type: ignore[no-untyped-def]
    """x (T, n), out float32 (T, n)."""
    for row in range(first, end):
        for j in range(x.shape[1]):
            out[row, j] = _widen(x[row, j])


@inline
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


@kernel
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
