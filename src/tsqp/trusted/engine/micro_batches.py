"""In how many parts a chunk crosses the layers: as many as was said, or as the first prompts show to be fastest.

Measured on what is asked for anyway and not by a probe: at ``masked`` a probe would use up pads, and what a worker on a
device hides depends on the rows, the line and both machines. Private modes give the same bits for any number of parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

TRIED = (1, 2, 4)
LEAST_ROWS = 256  # of a chunk that counts: fewer hide little, and say little
ROUNDS = 4  # chunks with each number of parts; the first of each sets things up and does not count
WORTH = 0.95  # of the time of one part that more of them must not exceed


class MicroBatches(Protocol):
    """Asked before each chunk, and told after it."""

    def parts(self, rows: int) -> int:
        """In how many parts a chunk of so many rows is to cross the layers."""

    def took(self, rows: int, parts: int, seconds: float) -> None:
        """How long a chunk took from its first row's norm to its last row's residual."""


class Fixed:
    """What was asked for."""

    def __init__(self, count: int) -> None:
        self._count = count

    def parts(self, rows: int) -> int:
        """See MicroBatches."""
        return self._count

    def took(self, rows: int, parts: int, seconds: float) -> None:
        """See MicroBatches: it changes nothing."""


class Measured:
    """Takes the numbers in ``tried`` in turn, the smallest first, then stays with the fastest."""

    def __init__(self, tried: Sequence[int] = TRIED) -> None:
        self._tried = tuple(tried)
        self._times: dict[int, list[float]] = {count: [] for count in self._tried}  # seconds of a row
        self._chosen: int | None = None

    def parts(self, rows: int) -> int:
        """See MicroBatches: 1 for few rows."""
        if rows < LEAST_ROWS:
            return 1
        return self._chosen or min(self._tried, key=lambda count: len(self._times[count]))

    def took(self, rows: int, parts: int, seconds: float) -> None:
        """See MicroBatches."""
        if self._chosen is not None or rows < LEAST_ROWS or parts not in self._times:
            return
        self._times[parts].append(seconds / rows)
        if all(len(times) >= ROUNDS for times in self._times.values()):
            best = {count: min(times[1:]) for count, times in self._times.items()}
            fastest = min(best, key=lambda count: best[count])
            least = self._tried[0]
            self._chosen = fastest if best[fastest] <= WORTH * best[least] else least


def micro_batches(asked: int | None, device: str) -> MicroBatches:
    """As asked; else measured beside a worker on a device, and one beside a CPU, whose cores may be this side's."""
    if asked is not None:
        return Fixed(asked)
    return Fixed(1) if device == "cpu" else Measured()
