"""The memory that caches may take."""

from __future__ import annotations


class KVBudget:
    """Bytes of caches: of ``limit``, None for no bound, so many are in use. Every change is in whole charges."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.used = 0

    def fits(self, size: int) -> bool:
        """Whether there is room for ``size`` more bytes."""
        return self.limit is None or self.used + size <= self.limit

    def fits_alone(self, size: int) -> bool:
        """Whether there would be, if nothing else were there."""
        return self.limit is None or size <= self.limit

    def charge(self, size: int) -> None:
        """Take ``size`` bytes that fit, or give some back where it is negative."""
        self.used += size
