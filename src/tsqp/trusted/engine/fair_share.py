"""Who comes first: the rows of forward passes that each tenant was given.

Sheng et al. 2024, "Fairness in Serving Large Language Models", §4: whoever was given least is next, and a tenant that
comes back begins no lower than those that are there.
"""

from __future__ import annotations

from collections import Counter


class FairShare:
    """Rows given to each tenant. A tenant is active while it has a request."""

    def __init__(self) -> None:
        self._given: dict[str, int] = {}
        self._requests: Counter[str] = Counter()

    def enter(self, tenant: str) -> None:
        """One more request of a tenant."""
        if not self._requests[tenant]:
            self._given[tenant] = max(self._given.get(tenant, 0), self._least())
        self._requests[tenant] += 1

    def leave(self, tenant: str) -> None:
        """One of its requests has ended."""
        self._requests[tenant] -= 1
        if self._requests[tenant]:
            return
        del self._requests[tenant]
        least = self._least()  # what lies below it is forgotten: ``enter`` would lift it anyway
        self._given = {
            one: rows for one, rows in self._given.items() if self._requests and (one in self._requests or rows > least)
        }

    def give(self, tenant: str, rows: int) -> None:
        """Count rows that were given to an active tenant."""
        self._given[tenant] += rows

    def given(self, tenant: str) -> int:
        """Rows that count against an active tenant."""
        return self._given[tenant]

    def _least(self) -> int:
        return min((self._given[one] for one, count in self._requests.items() if count), default=0)
