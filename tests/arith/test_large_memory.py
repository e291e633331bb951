"""Memory that is used again is one array's at a time, whatever was made of it."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.commands import LIMIT_S
from tsqp.arith.bits import keep_bits
from tsqp.arith.large_memory import LEAST_BYTES, MOST_WASTE, LargeMemory

ROWS = LEAST_BYTES // 4  # of one float32 each: just large enough


def address(array: np.ndarray[Any, np.dtype[Any]]) -> int:
    return int(array.__array_interface__["data"][0])


@settings(max_examples=30)  # of some six arrays each, all large: a mistake of the pool shows in the first few
@given(st.lists(st.tuples(st.booleans(), st.integers(ROWS // 2, 4 * ROWS)), max_size=12))
def test_arrays_that_are_there_share_nothing(steps: list[tuple[bool, int]]) -> None:
    memory, held = LargeMemory(), dict[int, torch.Tensor]()
    for number, (ends, rows) in enumerate(steps):
        if ends and held:
            del held[min(held)]
        tensor = memory.floats(rows, 1)
        assert tensor.shape == (rows, 1)
        held[number] = tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in held.items())


@pytest.mark.parametrize("rows", [ROWS, -(-ROWS // MOST_WASTE)])
def test_what_nothing_refers_to_is_used_again(rows: int) -> None:
    memory = LargeMemory()
    first = address(memory.floats(ROWS, MOST_WASTE).numpy())
    again = memory.array((rows, MOST_WASTE), np.float32)
    assert address(again) == first
    again[:] = 1  # it can be written


@pytest.mark.parametrize(
    "made_of_it",
    [
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.numpy()[3:][:2],
        lambda tensor: tensor[3:].view(torch.int32),
        lambda tensor: keep_bits(tensor),
        lambda tensor: memoryview(tensor.numpy()[4:]),
    ],
    ids=["array", "slice of an array", "view", "tensor with bits", "memoryview"],
)
def test_what_was_made_of_it_keeps_it(made_of_it: Any) -> None:
    memory = LargeMemory()
    tensor = memory.floats(ROWS, 1).fill_(7)
    kept = made_of_it(tensor)
    del tensor
    gc.collect()
    memory.floats(ROWS, 1).fill_(0)
    assert np.asarray(kept).view(np.float32).min() == 7


@pytest.mark.parametrize("rows", [1, ROWS - 1])
def test_little_memory_is_the_c_library_s(rows: int) -> None:
    memory = LargeMemory()
    memory.floats(rows, 1)
    assert not memory._spare


def test_a_much_larger_piece_is_not_taken() -> None:
    memory = LargeMemory()
    memory.floats(ROWS, MOST_WASTE + 1)
    kept = memory.floats(ROWS, 1)
    assert len(memory._spare) == 1
    del kept
    assert len(memory._spare) == 2


def test_the_smallest_piece_that_fits_is_taken() -> None:
    memory = LargeMemory()
    held = [memory.floats(rows, 1) for rows in (ROWS + 2, ROWS + 1, ROWS + 3)]
    wanted = address(held[1].numpy())
    held.clear()
    assert address(memory.floats(ROWS + 1, 1).numpy()) == wanted


def test_memory_may_be_given_back_while_another_thread_asks_for_some() -> None:
    memory, asked = LargeMemory(), threading.Event()

    class Spare(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            """Whoever looks for a piece that fits is held up in the middle."""
            found = list(super().__iter__())
            if threading.current_thread() is asking:
                looked.set()
                assert not given_back.wait(0.2)  # whoever gives back waits
            return iter(found)

    memory.floats(ROWS, 1)
    memory._spare = Spare(memory._spare)
    looked, given_back = threading.Event(), threading.Event()

    def ask() -> None:
        memory.floats(ROWS, 1)
        asked.set()

    def give() -> None:
        memory.give_back()
        given_back.set()

    asking, giving = threading.Thread(target=ask), threading.Thread(target=give)
    asking.start()
    assert looked.wait(LIMIT_S)
    giving.start()
    asking.join(LIMIT_S)
    giving.join(LIMIT_S)
    assert asked.is_set()


def test_spare_memory_is_given_back() -> None:
    memory = LargeMemory()
    held = memory.floats(ROWS, 1)
    memory.floats(ROWS, 1)
    memory.give_back()
    assert not memory._spare
    assert held.fill_(3).min() == 3
