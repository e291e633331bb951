"""Many rows of digits times 8-bit weights, in tiles of AMX: ``many_rows.py`` uses these loops.

The instruction ``tdpbusd`` multiplies a tile of 16 rows of 64 unsigned bytes with one of 64 by 16 signed bytes. It adds
the products to 16 by 16 sums in int32. Sums wrap around and never saturate, so they are right modulo 2³² whatever K.
Weights have to be packed for it, four terms of one column side by side. A block of columns is packed once, into memory
that stays in the second cache, and all rows of digits pass over it. Two by two tiles of sums stay in registers, so that
each tile that is loaded is used twice; for numbers mod p the two tiles of digits are two digits of the same rows.

Tiles belong to whoever computes: by the calling convention of x86-64 Linux no function keeps anything in them for its
caller. Each loop sets them up at its start and gives them back at its end.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tsqp.arith.digits import MULTIPLE, reduced
from tsqp.arith.jit import inline, kernel
from tsqp.arith.vnni import features

ROWS = 16  # of digits in a tile; columns of a tile of weights, too
TERMS = 64  # of one instruction, and bytes of a row of a tile
TILE = ROWS * TERMS  # bytes
COLUMNS = 2 * ROWS  # that are computed at once
TERMS_OF_A_WORD = 4  # of one column, side by side

Words = np.ndarray[Any, np.dtype[np.int32]]

_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18
_I8, _I64 = ir.IntType(8), ir.IntType(64)
_VOID, _ADDRESS = ir.VoidType(), _I8.as_pointer()

# What ldtilecfg reads: palette 1; for each of 8 tiles the bytes of a row, and its rows (Intel SDM volume 1, 18.2).
_SHAPES = np.zeros(64, np.uint8)
_SHAPES[0] = 1
_SHAPES[16:32:2] = TERMS
_SHAPES[48:56] = ROWS


@cache
def permitted() -> bool:
    """Whether the processor has these tiles and Linux lets this process use them, for which a process asks once."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or not features() >= {"amx-int8", "amx-tile"}:
        return False
    answer: int = ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)
    return answer == 0


def _typed_take(_context: Any, shapes: Any) -> Any:
    """Tiles of these shapes for this thread."""
    return types.void(shapes), _emit_take


def _emit_take(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
    shapes = context.make_array(signature.args[0])(context, b, args[0])
    b.call(_function(b, [_ADDRESS], "llvm.x86.ldtilecfg"), [shapes.data])
    return context.get_dummy_value()


def _typed_give_back(_context: Any) -> Any:
    """No tiles any more: a thread that has none is switched faster."""
    return types.void(), _emit_give_back


def _emit_give_back(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
    b.call(_function(b, [], "llvm.x86.tilerelease"), [])
    return context.get_dummy_value()


def _typed_multiply(_: Any, x: Any, one: Any, other: Any, stride: Any, w: Any, at: Any, steps: Any, s: Any) -> Any:
    """16 rows of digits from each of two places of x, uint8, flat, ``stride`` bytes apart, times two panels of weights.

    The panels are ``steps`` packed tiles each and begin ``at`` bytes into w, int8, flat. int32 into s (2, 16, 32).
    """
    return types.void(x, types.int64, types.int64, types.int64, w, types.int64, types.int64, s), _emit_multiply


def _emit_multiply(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
    x, w, sums = (context.make_array(signature.args[i])(context, b, args[i]).data for i in (0, 4, 7))
    stride, at, steps = args[3], args[5], args[6]
    zero = _function(b, [_I8], "llvm.x86.tilezero")
    load = _function(b, [_I8, _ADDRESS, _I64], "llvm.x86.tileloadd64")
    store = _function(b, [_I8, _ADDRESS, _I64], "llvm.x86.tilestored64")
    dot = _function(b, [_I8] * 3, "llvm.x86.tdpbusd")
    rows = [b.gep(x, [args[i]]) for i in (1, 2)]
    panels = [b.gep(w, [at]), b.gep(w, [b.add(at, b.mul(steps, _I64(TILE)))])]
    total = [[_I8(0), _I8(1)], [_I8(2), _I8(3)]]  # tiles 0 to 3 are sums, 4 and 5 digits, 6 and 7 weights
    digits, weights = [_I8(4), _I8(5)], [_I8(6), _I8(7)]

    for tile in total[0] + total[1]:
        b.call(zero, [tile])
    with cgutils.for_range(b, steps) as loop:
        for tile, panel in zip(weights, panels, strict=True):
            b.call(load, [tile, b.gep(panel, [b.mul(loop.index, _I64(TILE))]), _I64(TERMS)])
        for tile, row, own in zip(digits, rows, total, strict=True):
            b.call(load, [tile, b.gep(row, [b.mul(loop.index, _I64(TERMS))]), stride])
            for sum_tile, weight in zip(own, weights, strict=True):
                b.call(dot, [sum_tile, tile, weight])
    for i in (0, 1):
        for j in (0, 1):
            place = b.gep(b.bitcast(sums, _ADDRESS), [_I64(4 * (i * ROWS * COLUMNS + j * ROWS))])
            b.call(store, [total[i][j], place, _I64(4 * COLUMNS)])
    return context.get_dummy_value()


def _function(b: ir.IRBuilder, arguments: list[Any], name: str) -> Any:
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(_VOID, arguments), name)


_take_tiles: Any = intrinsic(_typed_take)
_give_back_tiles: Any = intrinsic(_typed_give_back)
_multiply: Any = intrinsic(_typed_multiply)


@kernel
def _aligned(size):  # type: ignore[no-untyped-def]
    """Zeros uint8 (size,) from the start of a cache line: tiles whose rows cross lines load at a third of the rate."""
    memory = np.zeros(size + TERMS, np.uint8)
    skip = -memory.ctypes.data % TERMS
    return memory[skip : skip + size]


@kernel
def _pack(words, first, end, steps, packed):  # type: ignore[no-untyped-def]
    """Rows ``first`` to ``end`` of weights, words of four terms (N, K / 4), as panels of 16 columns: flat words.

    A panel is ``steps`` tiles; a row of a tile is one word of each column. What is beyond K stays zero.
    """
    for column in range(end - first):
        at = (column // ROWS * steps * ROWS) * ROWS + column % ROWS
        row = words[first + column]
        for k in range(words.shape[1]):
            packed[at + k * ROWS] = row[k]


@kernel
def _put(tile, out, row, n, end):  # type: ignore[no-untyped-def]
    """A tile (16, 32) to its place in out; columns from ``end`` on are not there. A known width makes the loop fast."""
    if n + COLUMNS <= end:
        for i in range(ROWS):
            for j in range(COLUMNS):
                out[row + i, n + j] = tile[i, j]
    else:
        for i in range(ROWS):
            for j in range(end - n):
                out[row + i, n + j] = tile[i, j]


@kernel
def sums_of_many(x, words, columns, out, first, end):  # type: ignore[no-untyped-def]
    """x uint8 (M, K), K a multiple of 64, M ≥ 16; weights as words int32 (N, K / 4): x·wᵀ modulo 2³² into out int32
    (M, N), for blocks ``first`` to ``end`` of ``columns`` columns, a multiple of 32.
    """
    inner, rows, flat = x.shape[1], x.shape[0], x.reshape(-1)
    steps = inner // TERMS
    packed = _aligned(columns * inner)
    sums = _aligned(2 * ROWS * COLUMNS * 4).view(np.int32).reshape(2, ROWS, COLUMNS)
    _take_tiles(_SHAPES)
    for block in range(first, end):
        low, high = block * columns, min(block * columns + columns, len(words))
        _pack(words, low, high, steps, packed.view(np.int32))
        for row in range(0, rows, 2 * ROWS):
            one, other = min(row, rows - ROWS), min(row + ROWS, rows - ROWS)  # the last tiles do some rows twice
            for n in range(low, high, COLUMNS):
                _multiply(flat, one * inner, other * inner, inner, packed, (n - low) * inner, steps, sums)
                _put(sums[0], out, one, n, high)
                _put(sums[1], out, other, n, high)
    _give_back_tiles()


@kernel
def product_of_many(x, words, offsets, columns, out, first, end):  # type: ignore[no-untyped-def]
    """Digits x uint8 (digits, T, K), the lowest first, two or four, T ≥ 16, times weights as in
    ``sums_of_many``, less offsets int32 (N,), weighted by 256ᵐ, mod p: into out uint32 (T, N), for blocks of columns.
    """
    digits, rows, inner = x.shape
    steps, flat = inner // TERMS, x.reshape(-1)
    packed = _aligned(columns * inner)
    own_offsets = np.zeros(columns, np.int32)
    sums = _aligned(digits * ROWS * COLUMNS * 4).view(np.int32).reshape(digits, ROWS, COLUMNS)
    joined = np.empty((ROWS, COLUMNS), np.uint32)
    _take_tiles(_SHAPES)
    for block in range(first, end):
        low, high = block * columns, min(block * columns + columns, len(words))
        _pack(words, low, high, steps, packed.view(np.int32))
        own_offsets[: high - low] = offsets[low:high]
        for start in range(0, rows, ROWS):
            row = min(start, rows - ROWS)  # the last tile does some rows twice
            for n in range(low, high, COLUMNS):
                for m in range(0, digits, 2):
                    one, other = (m * rows + row) * inner, ((m + 1) * rows + row) * inner
                    _multiply(flat, one, other, inner, packed, (n - low) * inner, steps, sums[m : m + 2])
                _join(sums, own_offsets, n - low, joined)
                _put(joined, out, row, n, high)
    _give_back_tiles()


@inline
def _weighted(total, offset, weight):  # type: ignore[no-untyped-def]
    """A sum less its offset, in int32, where both may have wrapped around; times 2 to the ``weight``."""
    return np.int64(np.int32(total - offset)) << np.int64(weight)


@kernel
def _join(sums, offsets, at, joined):  # type: ignore[no-untyped-def]
    """A tile of sums int32 (digits, 16, 32), less offsets from ``at`` on, weighted, mod p: uint32 (16, 32).

    Two loops, as a loop over digits within them would not become one of vectors.
    """
    four = len(sums) == 4
    for i in range(ROWS):
        if four:
            for j in range(COLUMNS):
                offset = offsets[at + j]
                low = _weighted(sums[0, i, j], offset, 0) + _weighted(sums[1, i, j], offset, 8)
                high = _weighted(sums[2, i, j], offset, 16) + _weighted(sums[3, i, j], offset, 24)
                joined[i, j] = reduced(MULTIPLE + low + high)
        else:
            for j in range(COLUMNS):
                offset = offsets[at + j]
                low = _weighted(sums[0, i, j], offset, 0) + _weighted(sums[1, i, j], offset, 8)
                joined[i, j] = reduced(MULTIPLE + low)
