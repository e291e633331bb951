"""What an adapter adds to a product, as compiled loops: y += B·(A·x) of each row, with the adapter of that row.

Every sum has a fixed order of its terms, those of one row and no others: t = A·x adds columns one after another, and y
takes t's terms one rank after another. No leave is given to reorder or to fuse, so the bits are those of the source,
on any processor, in any company and for any number of threads. Memory is laid out so that neighbours in a vector are
neighbours in memory: A as (in, lanes), with the ranks of all matrices of a group beside each other, B as (r, out).
"""

from __future__ import annotations

import numpy as np
from numba import carray  # type: ignore[attr-defined]

from tsqp.arith.jit import inline, kernel
from tsqp.model.compiled import pointer

# Of one adapter in one linear group, int64 (ADAPTER_NUMBERS,): the address of A, the columns of A, and for each of at
# most three matrices its first column of A, its rank, its first column of y, how many it has, and the address of B.
# No columns: the adapter does nothing here; no rank: it does nothing to this matrix.
A, LANES, PARTS = range(3)
FIRST_LANE, RANK, FIRST_OUT, WIDTH, B = range(5)
PART_NUMBERS, MOST_PARTS = 5, 3
ADAPTER_NUMBERS = PARTS + PART_NUMBERS * MOST_PARTS

_FIRST, _ONE = np.int64(0), np.int64(1)
_UNROLLED = np.int64(8)


@inline
def _held(address, like, rows, width):  # type: ignore[no-untyped-def]
    """The memory at an address as (rows, width), of the type of the array ``like``."""
    return carray(pointer(address, like), (rows, width))  # type: ignore[call-arg]


@kernel
def _add_products(x, a, sums):  # type: ignore[no-untyped-def]
    """sums float32 (lanes,) += x float32 (K,) times a float32 (K, lanes), one column of x after another."""
    inner, lanes = a.shape
    whole = inner - inner % _UNROLLED
    for i in range(_FIRST, whole, _UNROLLED):
        x0, x1, x2, x3, x4, x5, x6, x7 = (
            x[i],
            x[i + 1],
            x[i + 2],
            x[i + 3],
            x[i + 4],
            x[i + 5],
            x[i + 6],
            x[i + 7],
        )
        for k in range(lanes):
            total = sums[k] + x0 * a[i, k]
            total += x1 * a[i + 1, k]
            total += x2 * a[i + 2, k]
            total += x3 * a[i + 3, k]
            total += x4 * a[i + 4, k]
            total += x5 * a[i + 5, k]
            total += x6 * a[i + 6, k]
            sums[k] = total + x7 * a[i + 7, k]
    for i in range(whole, inner):
        for k in range(lanes):
            sums[k] += x[i] * a[i, k]


@kernel
def _add_rows(sums, b, y):  # type: ignore[no-untyped-def]
    """y float32 (N,) += sums float32 (r,) times b float32 (r, N), one rank after another."""
    ranks = b.shape[0]
    whole = ranks - ranks % 4
    for k in range(_FIRST, whole, 4):
        s0, s1, s2, s3 = sums[k], sums[k + 1], sums[k + 2], sums[k + 3]
        for j in range(len(y)):
            total = y[j] + s0 * b[k, j]
            total += s1 * b[k + 1, j]
            total += s2 * b[k + 2, j]
            y[j] = total + s3 * b[k + 3, j]
    for k in range(whole, ranks):
        for j in range(len(y)):
            y[j] += sums[k] * b[k, j]


@kernel
def add_low_rank(x, y, of_row, table, first, end):  # type: ignore[no-untyped-def]
    """Rows ``first`` to ``end`` of x float32 (T, K) and y float32 (T, N), which is changed.

    of_row int64 (T,): the row of the table that each has, -1 for none; table int64 (adapters, ADAPTER_NUMBERS).
    """
    inner = x.shape[1]
    for row in range(first, end):
        if of_row[row] < 0:
            continue
        own = table[of_row[row]]
        if own[LANES] == 0:
            continue
        sums = np.zeros(own[LANES], np.float32)
        _add_products(x[row], _held(own[A], x, inner, own[LANES]), sums)
        for n in range(MOST_PARTS):
            part = own[PARTS + n * PART_NUMBERS : PARTS + (n + 1) * PART_NUMBERS]
            if part[RANK]:
                of_part = sums[part[FIRST_LANE] : part[FIRST_LANE] + part[RANK]]
                columns = y[row, part[FIRST_OUT] : part[FIRST_OUT] + part[WIDTH]]
                _add_rows(of_part, _held(part[B], x, part[RANK], part[WIDTH]), columns)
