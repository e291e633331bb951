"""How long calls of each kind take as a rule: who takes much longer than that has stalled, or has too much to do."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Iterable
from statistics import median

TIMES = 3.0  # the median: rarely longer on a machine that is well, and soon enough for who waits
ENOUGH, KEPT = 5, 33  # calls before the median is asked, and those that it is of
FIRST_S = 1.0  # before that
LEAST_S, MOST_S = 0.02, 10.0  # less is what a scheduler does to any process; after more a person has gone


class UsualTime:
    """Of calls of each kind: of one member, by one group. Kinds are few: they are kept for good."""

    def __init__(self) -> None:
        self._seconds: defaultdict[Hashable, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._median: dict[Hashable, float] = {}  # where there are enough

    def add(self, kind: Hashable, seconds: float) -> None:
        """A call of that kind was answered after so long."""
        known = self._seconds[kind]
        known.append(seconds)
        if len(known) >= ENOUGH:
            self._median[kind] = median(known)

    def median_s(self, kind: Hashable) -> float | None:
        """The median of the last ones, None while there are too few."""
        return self._median.get(kind)

    def patience_s(self, kinds: Iterable[Hashable]) -> float:
        """How long to wait for a call of one of the kinds before somebody else is asked.

        The quickest says what is usual: one that is slow on purpose cannot make the wait for itself longer.
        """
        known = [self._median[kind] for kind in kinds if kind in self._median]
        return min(MOST_S, max(LEAST_S, TIMES * min(known))) if known else FIRST_S
