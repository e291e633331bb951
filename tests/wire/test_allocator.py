"""The layout of an arena: nothing overlaps, everything comes back, gaps that meet become one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tsqp.wire.transport.shm.allocator import CACHE_LINE_BYTES, PAGE_BYTES, Allocator

TOTAL = 1 << 20
SIZES = st.integers(1, 4 * CACHE_LINE_BYTES) | st.integers(1, TOTAL // 3)


class Layout(RuleBasedStateMachine):
    """Any order of taking and giving back, against a plain list of what is taken."""

    taken = Bundle("taken")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = Allocator(TOTAL)
        self.sizes: dict[int, int] = {}

    @rule(target=taken, size=SIZES)
    def allocate(self, size: int) -> int | None:
        offset = self.allocator.allocate(size)
        if offset is not None:
            assert offset % (PAGE_BYTES if size >= 65_536 else CACHE_LINE_BYTES) == 0
            assert offset + size <= TOTAL
            assert all(offset + size <= other or other + n <= offset for other, n in self.sizes.items())
            self.sizes[offset] = size
        return offset

    @rule(offset=consumes(taken))
    def free(self, offset: int | None) -> None:
        if offset is not None:
            self.allocator.free(offset)
            del self.sizes[offset]

    @invariant()
    def what_is_taken_is_known(self) -> None:
        rounded = sum(-(-size // CACHE_LINE_BYTES) * CACHE_LINE_BYTES for size in self.sizes.values())
        assert self.allocator.taken_bytes == rounded

    def teardown(self) -> None:
        for offset in self.sizes:
            self.allocator.free(offset)
        assert self.allocator.allocate(TOTAL) == 0  # one gap again, of everything


TestLayout = Layout.TestCase


@given(st.lists(SIZES, max_size=30))
def test_low_offsets_come_first(sizes: list[int]) -> None:
    allocator = Allocator(TOTAL)
    first = [allocator.allocate(size) for size in sizes]
    for offset in first:
        if offset is not None:
            allocator.free(offset)
    assert [allocator.allocate(size) for size in sizes] == first


def test_what_does_not_fit_changes_nothing() -> None:
    allocator = Allocator(TOTAL)
    assert allocator.allocate(TOTAL + 1) is None
    assert allocator.taken_bytes == 0
    assert allocator.allocate(TOTAL) == 0
    assert allocator.allocate(1) is None


def test_nothing_is_given_back_twice() -> None:
    allocator = Allocator(TOTAL)
    offset = allocator.allocate(100)
    assert offset is not None
    allocator.free(offset)
    with pytest.raises(KeyError):
        allocator.free(offset)
