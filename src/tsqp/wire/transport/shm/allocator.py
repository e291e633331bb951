"""Which bytes of an arena are taken: first fit over a sorted list of gaps. Numbers only, no memory."""

from __future__ import annotations

from bisect import bisect_left

CACHE_LINE_BYTES = 64  # neighbours never share one
PAGE_BYTES = 4096
_PAGED_FROM_BYTES = 64 * 1024  # from this size on the waste does not matter


class Allocator:
    """Hands out regions of ``size`` bytes. Low offsets first, so that memory once touched is touched again."""

    def __init__(self, size: int) -> None:
        self._gaps = [(0, size)]  # (first, end), ascending, never empty, never adjacent
        self._ends: dict[int, int] = {}  # of what is taken, by its offset

    @property
    def taken_bytes(self) -> int:
        """Bytes in use, with what alignment added to their ends."""
        return sum(end - first for first, end in self._ends.items())

    def allocate(self, size: int) -> int | None:
        """The offset of ``size`` > 0 bytes, aligned to a cache line, or to a page if large. None if nothing fits."""
        alignment = PAGE_BYTES if size >= _PAGED_FROM_BYTES else CACHE_LINE_BYTES
        for index, (first, end) in enumerate(self._gaps):
            offset = _round_up(first, alignment)
            taken_end = offset + _round_up(size, CACHE_LINE_BYTES)
            if taken_end <= end:
                self._gaps[index : index + 1] = [gap for gap in ((first, offset), (taken_end, end)) if gap[0] < gap[1]]
                self._ends[offset] = taken_end
                return offset
        return None

    def free(self, offset: int) -> None:
        """Give back what ``allocate`` returned, joined with the gaps beside it. Raises KeyError for anything else."""
        first, end = offset, self._ends.pop(offset)
        index = bisect_left(self._gaps, (first, end))
        low, high = index, index
        if low > 0 and self._gaps[low - 1][1] == first:
            low -= 1
            first = self._gaps[low][0]
        if high < len(self._gaps) and self._gaps[high][0] == end:
            end = self._gaps[high][1]
            high += 1
        self._gaps[low:high] = [(first, end)]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
