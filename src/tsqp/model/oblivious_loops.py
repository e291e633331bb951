"""Loops that touch the same memory for every token id. Indices of memory depend on sizes alone, here and compiled."""

from __future__ import annotations

import numpy as np

from tsqp.arith.jit import kernel

BLOCK = 64  # rows whose masks are made together: as numbers in memory, no compiler makes branches of them


@kernel
def scan_rows(table, tokens, masks, out, first, end):  # type: ignore[no-untyped-def]
    """The rows of a table (V, W), unsigned, that tokens int64 (n,) name, into out (slots, n, W), which is 0 before.

    Slots ``first`` to ``end`` each go through an equal part of the table; one of them finds a row, the others leave 0.
    masks (slots, n, BLOCK), of the table's type, is room to work in.
    """
    slots, count, width = out.shape
    for slot in range(first, end):
        last = table.shape[0] * (slot + 1) // slots
        for start in range(table.shape[0] * slot // slots, last, BLOCK):
            rows = min(BLOCK, last - start)
            for at in range(count):
                for row in range(rows):
                    masks[slot, at, row] = -np.int64(tokens[at] == start + row)
            for row in range(rows):
                for at in range(count):
                    mask = masks[slot, at, row]
                    for i in range(width):
                        out[slot, at, i] |= table[start + row, i] & mask


@kernel
def count_tokens(tokens, counts):  # type: ignore[no-untyped-def]
    """Add to counts int64 (V,) how often each id is in tokens int64 (n,): n passes over all counts."""
    for start in range(0, counts.shape[0], BLOCK):
        here = counts[start : start + BLOCK]
        for at in range(tokens.shape[0]):
            for i in range(here.shape[0]):
                here[i] += np.int64(tokens[at] == start + i)
