"""Products mod p on CUDA's tensor cores, in Triton: what ``triton_field.py`` launches. Needs triton.

No sum leaves int32: a balanced digit is at least -128, a weight at most ±127, and K at most
``field.MAX_FIELD_TERMS`` = 132,104, so that |sum| ≤ 128 · 127 · 132,104 = 2,147,482,624 < p = 2³¹ - 1. A number that is
not canonical has balanced digits too, so that hostile bytes overflow nothing.

Residues here are of 0 … p, p for 0 as well, until they are stored. Twice p fits into 32 bits without a sign, and
256·r mod p turns the 31 bits of r left by 8, because 2³¹ is 1 mod p: no step needs 64 bits or a division.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def digit_bytes(x, DIGITS: tl.constexpr):
    """The balanced digits of x, the lowest first, in the bytes of an int32. 4 digits: x is below p; 2: of 16 bits.

    Adding 128 to every digit makes plain base-256 digits of balanced ones, and flipping their top bits takes it away.
    """
    if DIGITS == 4:
        centred = x - tl.where(x > 1073741823, 2147483647, 0)  # x - p for the upper half
        digits = (centred + -2139062144) ^ -2139062144  # 0x80808080
    else:
        digits = (x.to(tl.int32) + 32896) ^ 32896  # 0x8080
    return digits


@triton.jit
def append(residue, sums):
    """256·residue + sums mod p: a residue (uint32) of sums int32, |sums| < p."""
    return folded(turned(residue, 8) + of_sums(sums))


@triton.jit
def of_sums(sums):
    """A residue (uint32) of sums int32, |sums| < p."""
    return tl.where(sums < 0, sums + 2147483647, sums).to(tl.uint32)


@triton.jit
def turned(residue, BITS: tl.constexpr):
    """2^BITS·residue mod p."""
    return ((residue << BITS) & 2147483647) | (residue >> (31 - BITS))


@triton.jit
def folded(residue):
    """What is at most 2p, as a residue: bit 31 counts 1."""
    return (residue & 2147483647) + (residue >> 31)


@triton.jit
def stored(residue):
    """The canonical number of a residue, int32."""
    return tl.where(residue == 2147483647, 0, residue).to(tl.int32)


@triton.jit(do_not_specialize=["rows"])
def few_rows(
    x_ptr,
    w_ptr,
    y_ptr,
    rows,
    columns,
    inner,
    part_inner,
    x_stride,
    y_stride,
    part_stride,
    DIGITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """y = x·wᵀ mod p of one part of the inner size: x (rows, inner), w int8 (columns, inner), y int32 (rows, columns).

    x is read once; its digits are taken in registers and have an int32 accumulator each. The grid is (row tiles, column
    tiles, parts); ``part_inner`` is a multiple of INNER, and parts lie ``part_stride`` apart in y.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.program_id(2) * part_inner
    end = tl.minimum(begin + part_inner, inner)  # only the last part can end within INNER terms
    x_row = x_ptr + row.to(tl.int64)[:, None] * x_stride
    w_row = w_ptr + column.to(tl.int64)[None, :] * inner
    s0 = tl.full((ROWS, COLUMNS), 0, tl.int32)
    s1 = tl.full((ROWS, COLUMNS), 0, tl.int32)
    s2 = tl.full((ROWS, COLUMNS), 0, tl.int32)
    s3 = tl.full((ROWS, COLUMNS), 0, tl.int32)
    for first in range(begin, end, INNER):
        k = first + tl.arange(0, INNER)
        x = tl.load(x_row + k[None, :], mask=(row[:, None] < rows) & (k[None, :] < inner), other=0)
        w = tl.load(w_row + k[:, None], mask=(column[None, :] < columns) & (k[:, None] < inner), other=0)
        d = digit_bytes(x, DIGITS)
        s0 = tl.dot(d.to(tl.int8), w, s0, out_dtype=tl.int32)
        s1 = tl.dot((d >> 8).to(tl.int8), w, s1, out_dtype=tl.int32)
        if DIGITS == 4:
            s2 = tl.dot((d >> 16).to(tl.int8), w, s2, out_dtype=tl.int32)
            s3 = tl.dot((d >> 24).to(tl.int8), w, s3, out_dtype=tl.int32)
    y = tl.full((ROWS, COLUMNS), 0, tl.uint32)
    if DIGITS == 4:
        y = append(append(y, s3), s2)
    y = append(append(y, s1), s0)
    place = y_ptr + tl.program_id(2).to(tl.int64) * part_stride + row.to(tl.int64)[:, None] * y_stride + column[None, :]
    tl.store(place, stored(y), mask=(row[:, None] < rows) & (column[None, :] < columns))


@triton.jit(do_not_specialize=["parts", "rows"])
def add_parts(parts_ptr, y_ptr, parts, rows, columns, y_stride, SIZE: tl.constexpr):
    """y (rows, columns) = the sum mod p of int32 (parts, rows, columns)."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < rows * columns
    y = tl.full((SIZE,), 0, tl.uint32)
    for part in range(parts):
        y = folded(y + tl.load(parts_ptr + part * rows * columns + at, mask=inside, other=0).to(tl.uint32))
    tl.store(y_ptr + (at // columns) * y_stride + at % columns, stored(y), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def split(x_ptr, digits_ptr, rows, inner, x_stride, DIGITS: tl.constexpr, SIZE: tl.constexpr):
    """The digits of x (rows, inner): int8 (DIGITS, rows, inner), the lowest first."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < rows.to(tl.int64) * inner
    x = tl.load(x_ptr + (at // inner) * x_stride + at % inner, mask=inside, other=0)
    d = digit_bytes(x, DIGITS)
    for digit in tl.static_range(DIGITS):
        tl.store(digits_ptr + digit * rows.to(tl.int64) * inner + at, (d >> 8 * digit).to(tl.int8), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def many_rows(
    digits_ptr,
    w_ptr,
    y_ptr,
    rows,
    columns,
    inner,
    y_stride,
    DIGITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """y = x·wᵀ mod p, of x's digits int8 (DIGITS, rows, inner): w int8 (columns, inner), y int32 (rows, columns).

    One accumulator, which four would leave no registers for in a tile of this size: a pass over the inner size for each
    digit, the highest first, and a residue that takes up each pass (Horner). The grid is (row tiles, column tiles).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    w_row = w_ptr + column.to(tl.int64)[None, :] * inner
    y = tl.full((ROWS, COLUMNS), 0, tl.uint32)
    for step in range(DIGITS):
        plane = (DIGITS - 1 - step) * rows.to(tl.int64)
        d_row = digits_ptr + (plane + row)[:, None] * inner
        sums = tl.full((ROWS, COLUMNS), 0, tl.int32)
        for first in range(0, inner, INNER):
            k = first + tl.arange(0, INNER)
            d = tl.load(d_row + k[None, :], mask=(row[:, None] < rows) & (k[None, :] < inner), other=0)
            w = tl.load(w_row + k[:, None], mask=(column[None, :] < columns) & (k[:, None] < inner), other=0)
            sums = tl.dot(d, w, sums, out_dtype=tl.int32)
        y = append(y, sums)
    place = y_ptr + row.to(tl.int64)[:, None] * y_stride + column[None, :]
    tl.store(place, stored(y), mask=(row[:, None] < rows) & (column[None, :] < columns))


@triton.jit
def added(residues, COLUMNS: tl.constexpr, OTHERS: tl.constexpr, BITS: tl.constexpr):
    """The first half of (COLUMNS, 2·OTHERS) and 2^BITS times the second, mod p: (COLUMNS, OTHERS).

    Where OTHERS is a multiple of 8, a thread of a tensor core's accumulator has the numbers of both halves.
    """
    low, high = tl.split(tl.permute(tl.reshape(residues, (COLUMNS, 2, OTHERS)), (0, 2, 1)))
    return folded(low + turned(high, BITS))


@triton.jit(do_not_specialize=["rows"])
def digits_at_once(
    digits_ptr,
    w_ptr,
    y_ptr,
    rows,
    columns,
    inner,
    y_stride,
    DIGITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """As ``many_rows``, in one pass over the inner size: all digits of a row are columns of one accumulator.

    That is yᵀ, (COLUMNS, DIGITS·ROWS), the lowest digit first; w is read once, where ``many_rows`` reads it four times.
    """
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    each = tl.arange(0, DIGITS * ROWS)
    digit_row = tl.program_id(0) * ROWS + each % ROWS
    inside = digit_row < rows
    d_row = digits_ptr + ((each // ROWS) * rows.to(tl.int64) + digit_row)[None, :] * inner
    w_row = w_ptr + column.to(tl.int64)[:, None] * inner
    sums = tl.full((COLUMNS, DIGITS * ROWS), 0, tl.int32)
    for first in range(0, inner, INNER):
        k = first + tl.arange(0, INNER)
        w = tl.load(w_row + k[None, :], mask=(column[:, None] < columns) & (k[None, :] < inner), other=0)
        d = tl.load(d_row + k[:, None], mask=inside[None, :] & (k[:, None] < inner), other=0)
        sums = tl.dot(w, d, sums, out_dtype=tl.int32)
    y = of_sums(sums)
    if DIGITS == 4:
        y = added(y, COLUMNS, 2 * ROWS, 16)
    y = added(y, COLUMNS, ROWS, 8)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = y_ptr + row.to(tl.int64)[None, :] * y_stride + column[:, None]
    tl.store(place, stored(y), mask=(row[None, :] < rows) & (column[:, None] < columns))
