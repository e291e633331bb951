"""How fast memory can be read: a sum of all its words, which no product of few rows can beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from tsqp.arith.row_threads import row_threads
from tsqp.bench.read_loop import read


def reading(weights: Sequence[torch.Tensor]) -> Callable[[], None]:
    """Reads matrices (N, K) on the CPU, all of one N and with rows of whole int64, on torch's number of threads."""
    words = [one.view(torch.int64).numpy() for one in weights]
    sums = np.empty(len(words[0]), np.int64)

    def read_all() -> None:
        for one in words:
            row_threads().run(read, len(one), one, sums, least=2)

    return read_all
