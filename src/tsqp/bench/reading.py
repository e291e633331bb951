"""How fast memory can be read: a sum of all its words, which no product of few rows can beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from tsqp.arith.jit import kernel
from tsqp.arith.row_threads import row_threads


@kernel
def read(words, out, first, end):  # type: ignore[no-untyped-def]
    """Sums of rows of int64: out (N,)."""
    for row in range(first, end):
        total = np.int64(0)
        for j in range(words.shape[1]):
            total += words[row, j]
        out[row] = total


def reading(weights: Sequence[torch.Tensor]) -> Callable[[], None]:
    """Reads matrices (N, K) on the CPU, all of one N and with rows of whole int64, on torch's number of threads."""
    words = [one.view(torch.int64).numpy() for one in weights]
    sums = np.empty(len(words[0]), np.int64)

    def read_all() -> None:
        for one in words:
            row_threads().run(read, len(one), one, sums, least=2)

    return read_all
