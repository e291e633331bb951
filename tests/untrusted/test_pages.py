"""Pages of one connection: no two sequences have one together, and a sequence finds its positions where they were."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.untrusted.calls import CONFIG
from tsqp.untrusted.pages import PAGE, PagedSequence, Pages, pages_for, runs

CPU = torch.device("cpu")


@given(st.sets(st.integers(0, 40)))
def test_runs_are_the_numbers(numbers: set[int]) -> None:
    found = list(runs(sorted(numbers)))
    assert [number for first, stop in found for number in range(first, stop)] == sorted(numbers)
    assert all(stop < first for (_, stop), (first, _) in pairwise(found)), "neighbours are one run"


@given(st.integers(1, 10_000))
def test_pages_for_is_the_least_that_holds_them(positions: int) -> None:
    assert (pages_for(positions) - 1) * PAGE < positions <= pages_for(positions) * PAGE


@given(st.permutations(range(1, 6)), st.integers(0, 5 * PAGE), st.integers(0, 5 * PAGE))
def test_slots_of_a_range_are_those_of_its_positions(pages: list[int], one: int, other: int) -> None:
    sequence, (first, end) = PagedSequence(), sorted((one, other))
    sequence.pages = pages
    assert sequence.slots(first, end).tolist() == [sequence.slot(position) for position in range(first, end)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3 * PAGE)), max_size=12))
def test_every_sequence_keeps_its_own(steps: list[tuple[int, int]]) -> None:
    """(which sequence, how many more positions; 0 ends it). Each position holds a number that nobody else wrote."""
    pages = Pages(CONFIG, torch.float32, CPU, 1 << 30)
    sequences = [PagedSequence() for _ in range(4)]
    held: list[list[int]] = [[], [], [], []]
    written = 0
    for which, more in steps:
        if more == 0:
            pages.release(sequences[which])
            sequences[which], held[which] = PagedSequence(), []
        pages.reserve(sequences[which], len(held[which]) + more)
        for position in range(len(held[which]), len(held[which]) + more):
            written += 1
            keys, values = pages.slots(1)
            keys[sequences[which].slot(position)] = written
            values[sequences[which].slot(position)] = -written
            held[which].append(written)
        for sequence, numbers in zip(sequences, held, strict=True):
            assert 0 not in sequence.pages
            if numbers:
                index = torch.tensor(sequence.pages, dtype=torch.int32)
                keys, values = pages.view(1, sequence.pages, index, 0, len(numbers))
                assert keys[0, :, 0].tolist() == numbers
                assert values[-1, :, -1].tolist() == [-number for number in numbers]


def test_a_page_is_zero_when_a_sequence_gets_it() -> None:
    pages = Pages(CONFIG, torch.float32, CPU, 1 << 30)
    first, second = PagedSequence(), PagedSequence()
    pages.reserve(first, 3 * PAGE)
    pages.memory.fill_(torch.nan)
    pages.release(first)
    pages.reserve(second, 2 * PAGE)
    assert not pages.memory[:, :, second.pages].any()
