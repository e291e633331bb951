"""Memory that dumps and forks do not have, as Linux tells of it."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp.arith.secret_memory import SLAB_BYTES, SecretMemory, secret_array, secret_bytes, secret_copy
from tsqp.tee.memory import mapping_flags

linux = pytest.mark.skipif(sys.platform != "linux", reason="the marks are Linux's")


def address(memory: object) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)  # type: ignore[call-overload]


def seen_by_a_forked_process(look: Callable[[], bytes]) -> bytes:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, look())
        os._exit(0)
    os.close(writing)
    found = os.read(reading, 1 << 16)
    os.close(reading)
    os.waitpid(child, 0)
    return found


@linux
@pytest.mark.parametrize("size", [32, 1 << 14, SLAB_BYTES, 1 << 20])
def test_it_is_left_out_of_dumps_and_wiped_in_a_fork(size: int) -> None:
    flags = mapping_flags(address(secret_bytes(bytes(size))))
    assert {"dd", "wf"} <= flags


@linux
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_sees_zeros_and_this_one_what_it_wrote() -> None:
    key, pads = secret_bytes(b"k" * 32), secret_copy(np.full((16, 4096), 7, np.uint32))
    assert seen_by_a_forked_process(lambda: bytes(key) + pads[5, :8].tobytes()) == bytes(64)
    assert bytes(key) == b"k" * 32
    assert (pads == 7).all()


def test_copies_are_copies() -> None:
    values = np.arange(12, dtype=np.uint32).reshape(3, 4)
    copied = secret_copy(values)
    values[0] = 9
    assert copied.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert bytes(secret_bytes(b"abc")) == b"abc"
    assert len(secret_array((0, 5))) == 0


@given(st.lists(st.tuples(st.integers(1, 200_000), st.booleans()), max_size=40))
def test_no_two_pieces_that_are_in_use_share_a_byte(asked: list[tuple[int, bool]]) -> None:
    memory, held = SecretMemory(), list[tuple[int, int, object]]()
    for size, keep in asked:
        piece = memory.piece(size)
        first = address(piece)
        assert all(first + size <= start or end <= first for start, end, _ in held)
        if keep:
            held.append((first, first + size, piece))
        del piece


def test_a_piece_comes_back_once_its_last_view_is_gone() -> None:
    memory = SecretMemory()
    for size in (32, 1 << 20):
        piece = memory.piece(size)
        view = np.frombuffer(memoryview(piece), np.uint8)[3:9]
        first = address(piece)
        del piece
        others = [memory.piece(size) for _ in range(3)]
        assert first not in [address(one) for one in others], "a view still shows it"
        del view
        gc.collect()
        several = [memory.piece(size) for _ in range(1 + SLAB_BYTES // 64)] if size == 32 else [memory.piece(size)]
        assert first in [address(one) for one in several]


def test_large_pieces_wait_to_be_used_again_until_somebody_gives_them_back() -> None:
    memory, size = SecretMemory(), 1 << 20
    pieces = [memory.piece(size) for _ in range(5)] + [memory.piece(SLAB_BYTES)]
    places = {address(one) for one in pieces}
    in_use = memory.piece(size)
    in_use[0] = 7
    del pieces
    gc.collect()
    assert memory.spare_bytes() == 5 * size + SLAB_BYTES
    again = [memory.piece(size) for _ in range(5)]
    assert {address(one) for one in again} < places
    del again
    gc.collect()
    memory.give_back(keep=3 * size)
    assert 2 * size < memory.spare_bytes() <= 3 * size
    memory.give_back()
    assert memory.spare_bytes() == 0
    assert in_use[0] == 7


def test_what_is_kept_is_a_bound_for_all_sizes_together() -> None:
    memory = SecretMemory()
    pieces = [memory.piece(size) for size in (3 << 20, 2 << 20, 1 << 20, 100)]
    del pieces
    gc.collect()
    memory.give_back(keep=6 << 20)
    assert memory.spare_bytes() == 6 << 20
    memory.give_back(keep=5 << 20)
    assert 0 < memory.spare_bytes() <= 5 << 20


def test_what_a_dying_cycle_writes_reaches_no_other_holder() -> None:
    """Its finalisers run one after the other: none may give back what another still writes to."""

    class Holder:
        def __init__(self, key: memoryview) -> None:
            self.key, self.me = key, self

        def __del__(self) -> None:
            found.append(secret_bytes(b"n" * 32))
            self.key[:] = bytes(32)

    found: list[memoryview] = []
    holders = [Holder(secret_bytes(b"k" * 32)) for _ in range(8)]  # the older one is finalised first
    assert len(holders) == 8
    del holders
    gc.collect()
    assert len(found) == 8
    assert [bytes(key) for key in found] == [b"n" * 32] * 8
