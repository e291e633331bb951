"""Compiled loops of the guard: quantise and mask a row, check and unmask a row; see ``docs/masking.md``.

Rows are independent. Numbers mod p are uint32 below p; sums of their products are kept in two halves, since 2³¹ ≡ 1:
lo adds up the lower 31 bits, hi what is above, each below 2⁶⁴ for 2³³ terms. Every loop reads what it may trust only:
inputs are private memory, ``out`` may be memory that the worker reads and writes, and is never read here.

Covers: what each loop computes (test_kernels.py, tests/vectors), one pass over each secret
(test_mutants.py). Does not cover: who hands in what, which is linears.py. Assumes: numba compiles what is
written; no fastmath is used.
"""

from __future__ import annotations

import numpy as np

from tsqp.arith.digits import reduced
from tsqp.arith.jit import inline, kernel
from tsqp.arith.loops import quantise_row
from tsqp.arith.modulus import MAX_CENTRED, P

OK, NOT_FINITE, ERASED_PAD, OUT_OF_RANGE, MISMATCH, UNSEEN = range(6)  # verdicts on a row, UNSEEN before there is one
KINDS = 8  # what is wrong with slice s of a row has the verdict kind + 8·s
ERASED = np.uint32(0xFFFFFFFF)  # what used pads are overwritten with: no number mod p, so it cannot pass for one

_P, _P64, _HALF, _SHIFT = np.uint32(P), np.uint64(P), np.uint32(MAX_CENTRED), np.uint64(31)


@inline
def _canonical(centred):  # type: ignore[no-untyped-def]
    """int32 in ±(p - 1)/2 as uint32 below p. (The casts keep numba in 32 bits.)"""
    return np.uint32(np.uint32(centred) + np.uint32(_P & np.uint32(centred >> np.int32(31))))


@inline
def _reduce(value):  # type: ignore[no-untyped-def]
    """uint32 below 2p to below p: of value and value - p, the one that did not wrap around is the smaller."""
    return min(value, np.uint32(value - _P))


@inline
def _dot(a, b):  # type: ignore[no-untyped-def]
    """a · b mod p, both (n,). Four products, each below 2⁶², are added up and split as one."""
    lo = hi = np.uint64(0)
    quarter = a.shape[0] // 4  # the four lie apart, so that each is one of a vector's neighbours
    for i in range(quarter):
        total = np.uint64(a[i]) * np.uint64(b[i])
        total += np.uint64(a[i + quarter]) * np.uint64(b[i + quarter])
        total += np.uint64(a[i + 2 * quarter]) * np.uint64(b[i + 2 * quarter])
        total += np.uint64(a[i + 3 * quarter]) * np.uint64(b[i + 3 * quarter])
        lo += total & _P64
        hi += total >> _SHIFT
    for i in range(4 * quarter, a.shape[0]):
        lo += np.uint64(a[i]) * np.uint64(b[i])  # at most three, on top of less than 2⁶²
    return reduced(np.int64((lo & _P64) + (lo >> _SHIFT) + (hi & _P64) + (hi >> _SHIFT)))


@kernel
def quantise_and_mask(x, limit, projections, masked, pads, out, scales, expected, verdicts, first, end):  # type: ignore[no-untyped-def]
    """Quantise x float32 (T, K) into ``out``, with scales float32 (T,), and what the check is to find, uint32 (T, s·k).

    ``masked``: out uint32 (T, K) is x + pads mod p; pads uint32 (end - first, K), of these rows alone, are erased.
    Otherwise out int16 is x.
    """
    values, field = np.empty(x.shape[1], np.int32), np.empty(x.shape[1], np.uint32)
    without_pads = masked and pads.shape[1] != x.shape[1]
    for row in range(first, end):
        scale = quantise_row(x[row], limit, values)
        greatest = ERASED if without_pads else np.uint32(0)  # of the row's pads
        for i in range(values.shape[0]):
            field[i] = _canonical(values[i])
            if masked and not without_pads:
                pad = pads[row - first, i]  # read once: another thread may be erasing it
                greatest = max(greatest, pad)
                field[i] = _reduce(np.uint32(pad + field[i]))
                pads[row - first, i] = ERASED
        if not np.isfinite(scale):
            verdicts[row] = NOT_FINITE
        elif greatest >= _P:
            verdicts[row] = ERASED_PAD  # used before: this row would be in clear, so it goes nowhere
        else:
            for i in range(values.shape[0]):
                out[row, i] = field[i] if masked else values[i]
            for k in range(projections.shape[0]):
                expected[row, k] = _dot(field, projections[k])  # from private values: ``out`` may have been changed
            scales[row] = scale
            verdicts[row] = OK


@kernel
def project_weights(wq, vectors, bounds, out, first, end):  # type: ignore[no-untyped-def]
    """vectors uint32 (k, N) times wq int8 (N, K) mod p, of each slice by itself: out uint32 (s·k, K), slice by slice.

    ``bounds`` int64 (s + 1,): where slices of N begin, and where the last one ends. (127 · 2³¹ · N < 2⁶³ for N ≤ 2²⁴.)
    """
    for row in range(first, end):
        part, k = divmod(row, vectors.shape[0])
        total = np.zeros(wq.shape[1], np.int64)
        for j in range(bounds[part], bounds[part + 1]):
            element = np.int64(vectors[k, j])
            for i in range(wq.shape[1]):
                total[i] += np.int64(wq[j, i]) * element
        out[row] = total % np.int64(_P)


@kernel
def project(values, vectors, out, first, end):  # type: ignore[no-untyped-def]
    """values uint32 (T, n) against each of vectors (k, n): out uint32 (T, k)."""
    for row in range(first, end):
        for k in range(vectors.shape[0]):
            out[row, k] = _dot(values[row], vectors[k])


@kernel
def verify_and_unmask(reply, vectors, expected, bounds, masked, products, scaling, out, verdicts, first, end):  # type: ignore[no-untyped-def]
    """Check rows of a reply, each slice by itself, unmask and rescale them: out float32 (T, N).

    ``reply``: a private copy of these rows alone, uint32 (end - first, N). ``expected`` uint32 (T, s·k) and ``bounds``
    int64 (s + 1,): as ``project_weights`` has them. ``scaling``: scales float32 (T,) of x, and scales and bias float32
    (N,) of the weights. ``masked``: with the pads' ``products``, of these rows too, which are erased.

    A row of out counts if its verdict is OK.
    """
    scales, w_scales, bias = scaling
    for row in range(first, end):
        verdict = OK
        for part in range(bounds.shape[0] - 1):
            begin, stop = bounds[part], bounds[part + 1]
            own, largest = reply[row - first, begin:stop], np.uint32(0)
            for j in range(own.shape[0]):  # from 0: a loop of vectors needs an index that cannot be negative
                largest = max(largest, own[j])
            if verdict == OK and largest >= _P:
                verdict = OUT_OF_RANGE + KINDS * part
            for k in range(vectors.shape[0]):
                if verdict == OK and _dot(own, vectors[k, begin:stop]) != expected[row, part * vectors.shape[0] + k]:
                    verdict = MISMATCH + KINDS * part
        if verdict == OK and masked and products.shape[1] != reply.shape[1]:
            verdict = ERASED_PAD
        if verdict == OK:
            scale, greatest = scales[row], np.uint32(0)  # of the products
            for j in range(reply.shape[1]):
                value = reply[row - first, j]
                if masked:
                    product = products[row - first, j]  # read once: another thread may be erasing it
                    greatest = max(greatest, product)
                    value = _reduce(np.uint32(value + np.uint32(_P - product)))
                    products[row - first, j] = ERASED
                centred = np.int32(np.int32(value) - np.int32(_P)) if value > _HALF else np.int32(value)
                out[row, j] = np.float32(np.float32(centred) * scale) * w_scales[j] + bias[j]
            if greatest >= _P:
                verdict = ERASED_PAD
        verdicts[row] = verdict
