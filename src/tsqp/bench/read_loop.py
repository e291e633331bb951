"""The loop of ``bench/reading.py``."""

from __future__ import annotations

import numpy as np

from tsqp.arith.jit import kernel


@kernel
def read(words, out, first, end):  # type: ignore[no-untyped-def]
    """Sums of rows of int64: out (N,)."""
    for row in range(first, end):
        total = np.int64(0)
        for j in range(words.shape[1]):
            total += words[row, j]
        out[row] = total
