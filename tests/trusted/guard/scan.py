"""A scan of what a worker has seen for pads that were used twice.

Two rows x'₁, x'₂ share a pad iff x'₁ - x'₂ = xq₁ - xq₂, so iff every centred difference is within ±2·q_max. For
independent rows one element is with probability 6·10⁻⁵, so sorting by the first one leaves few pairs to compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tsqp.arith.modulus import P

Array = np.ndarray[Any, np.dtype[Any]]

WITHIN = 2 * 32_639  # 2·q_max, for the largest that q_max can be


def shared_pads(seen: Sequence[Array], within: int = WITHIN) -> list[tuple[int, int]]:
    """Pairs of rows that share a pad, of uint32 (R, K) matrices, as numbers of rows counted through all of them.

    Rows of different widths are compared as far as the narrower one goes, like two groups under one key.
    """
    width = min(rows.shape[1] for rows in seen)
    rows = np.concatenate([part[:, :width] for part in seen]).astype(np.int64)
    order = np.argsort(rows[:, 0], kind="stable")
    first = rows[order, 0]
    pairs = [np.empty((0, 2), np.int64)]
    for step in range(1, len(rows)):  # neighbours in sorted order, then those beside them: round the field
        near = (np.roll(first, -step) - first) % P <= within
        if not near.any():
            break
        pairs.append(np.stack([order[near], np.roll(order, -step)[near]], axis=1))
    found = np.concatenate(pairs)
    for column in range(1, width):
        found = found[_distance(rows[found[:, 0], column], rows[found[:, 1], column]) <= within]
    return sorted({(min(pair), max(pair)) for pair in found.tolist()})


def _distance(a: Array, b: Array) -> Array:
    """|a - b| centred mod p."""
    difference: Array = (a - b) % P
    return np.asarray(np.minimum(difference, P - difference))
