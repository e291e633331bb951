"""Caches of conversations that ended, kept for those that go on with them.

A cache is found by requests of its own scope alone, and the one that was used longest ago goes first.

Covers: nothing of another scope is found, copied or told by what is found (tests/trusted/engine/test_prefixes.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from tsqp.trusted.engine.kv_budget import KVBudget
from tsqp.trusted.engine.request import Beginning, ReusableCache

LEAST_ROWS = 16  # fewer positions than this are not worth a copy


@dataclass(frozen=True)
class Kept:
    """A cache, the tokens whose positions it holds, int64 (n,), and its bytes."""

    number: int
    scope: Hashable
    tokens: NDArray[np.int64]
    cache: ReusableCache
    size: int


@dataclass(frozen=True)
class Found:
    """The kept cache whose beginning a request shares, and how many positions of it."""

    kept: Kept
    length: int

    @property
    def whole(self) -> bool:
        """Whether the request goes on where the kept cache ends, and may have it."""
        return self.length == len(self.kept.tokens)


class Prefixes:
    """The kept caches, charged to a budget that they share with those of running requests."""

    def __init__(self, budget: KVBudget) -> None:
        self._budget = budget
        self._kept: OrderedDict[int, Kept] = OrderedDict()  # the one used longest ago first
        self._scopes: dict[Hashable, dict[int, Kept]] = {}
        self._numbers = count()
        self.size = 0  # bytes of all of them

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, scope: Hashable, tokens: Sequence[int], cache: ReusableCache) -> None:
        """Keep a cache that holds ``tokens``, which may be given up for room at any time.

        Its bytes must be free in the budget. What holds no more than another cache of its scope is let go.
        """
        held = np.array(tokens, np.int64)
        own = self._scopes.get(scope, {})
        if len(held) < LEAST_ROWS or any(_shared(held, other.tokens) == len(held) for other in own.values()):
            return
        for other in [one for one in own.values() if _shared(held, one.tokens) == len(one.tokens)]:
            self._remove(other)
        kept = Kept(next(self._numbers), scope, held, cache, cache.bytes_for(len(held)))
        self._kept[kept.number] = kept
        self._scopes.setdefault(scope, {})[kept.number] = kept
        self._charge(kept.size)

    def find(self, scope: Hashable, tokens: Sequence[int]) -> Found | None:
        """The kept cache of a scope that shares most of the beginning of ``tokens``."""
        wanted = np.array(tokens, np.int64)
        found = [Found(kept, _shared(wanted, kept.tokens)) for kept in self._scopes.get(scope, {}).values()]
        best = max(found, key=lambda one: one.length, default=None)
        return best if best is not None and best.length >= LEAST_ROWS else None

    def take(self, found: Found) -> ReusableCache:
        """The kept cache itself, cut to what is shared. Its bytes are no longer charged."""
        self._remove(found.kept)
        found.kept.cache.truncate(found.length)
        return found.kept.cache

    def beginning(self, found: Found) -> Beginning:
        """What is shared, to be copied before anything is written to the kept cache, which stays and was just used."""
        self._kept.move_to_end(found.kept.number)
        return Beginning(found.kept.cache, found.length)

    def drop_oldest(self) -> bool:
        """Let go of the one used longest ago; False where there is none."""
        if not self._kept:
            return False
        self._remove(next(iter(self._kept.values())))
        return True

    def clear(self) -> None:
        """Let go of all."""
        while self.drop_oldest():
            pass

    def _remove(self, kept: Kept) -> None:
        del self._kept[kept.number]
        own = self._scopes[kept.scope]
        del own[kept.number]
        if not own:
            del self._scopes[kept.scope]
        self._charge(-kept.size)

    def _charge(self, size: int) -> None:
        self.size += size
        self._budget.charge(size)


def _shared(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """How many tokens two texts have in common from their beginning on."""
    least = min(len(one), len(other))
    different = np.nonzero(one[:least] != other[:least])[0]
    return int(different[0]) if len(different) else least
