"""Memory that is locked is given back, and used again."""

from __future__ import annotations

import mmap

from tests.untrusted.fake_driver import FakeDriver
from tsqp.untrusted.backends.host_memory import BUFFER_BYTES, Arenas, Buffers

WINDOW = mmap.PAGESIZE


def arena(windows: int) -> memoryview:
    return memoryview(mmap.mmap(-1, windows * WINDOW))


def test_only_windows_that_calls_name_are_locked_each_once() -> None:
    driver, memory = FakeDriver(), arena(8)
    arenas = Arenas(driver, window_bytes=WINDOW)
    arenas.attach(b"one", memory)
    assert driver.registered == {}
    for _ in range(2):
        pieces = arenas.pieces(memory[WINDOW - 1 : 3 * WINDOW])
        assert pieces is not None
        assert [len(piece) for piece in pieces] == [1, WINDOW, WINDOW]
    assert sorted(driver.registered.values()) == [WINDOW] * 3


def test_memory_of_nobody_is_in_no_pieces() -> None:
    arenas = Arenas(FakeDriver())
    memory = arena(1)
    assert arenas.pieces(memory) is None
    arenas.attach(b"one", memory)
    assert arenas.pieces(arena(1)) is None
    assert arenas.pieces(memory.toreadonly()) is None
    assert arenas.pieces(memory[:0]) is None


def test_a_connection_that_leaves_makes_room_for_another() -> None:
    driver = FakeDriver()
    arenas = Arenas(driver, window_bytes=WINDOW, locked_bytes=2 * WINDOW)
    first, second = arena(2), arena(2)
    for peer, memory in ((b"one", first), (b"two", second)):
        arenas.attach(peer, memory)
    assert arenas.pieces(first) is not None
    assert arenas.pieces(second) is None
    arenas.detach(b"one")
    assert driver.registered == {}
    assert arenas.pieces(first) is None
    assert arenas.pieces(second) is not None
    arenas.close()
    arenas.close()
    assert driver.registered == {}


def test_attaching_again_keeps_what_is_locked() -> None:
    driver, memory = FakeDriver(), arena(1)
    arenas = Arenas(driver, window_bytes=WINDOW)
    for _ in range(2):
        arenas.attach(b"one", memory)
        assert arenas.pieces(memory) is not None
    assert len(driver.registered) == 1


def test_a_refusal_leaves_what_was_locked_in_use() -> None:
    driver, memory = FakeDriver(), arena(2)
    arenas = Arenas(driver, window_bytes=WINDOW)
    arenas.attach(b"one", memory)
    assert arenas.pieces(memory[:8]) is not None
    driver.refusal = "no more"
    assert arenas.pieces(memory[WINDOW:]) is None
    assert arenas.pieces(memory[:8]) is not None
    driver.refusal = None
    assert arenas.pieces(memory[WINDOW:]) is None, "it is not asked again"


def test_buffers_are_used_again_once_they_are_released() -> None:
    buffers = Buffers(FakeDriver())
    first, second = buffers.take(8), buffers.take(8)
    assert first.data_ptr() != second.data_ptr()
    assert (len(first), buffers.taken_bytes) == (8, 2 * BUFFER_BYTES)
    buffers.release()
    assert buffers.taken_bytes == 0
    assert {buffers.take(BUFFER_BYTES).data_ptr() for _ in range(2)} == {first.data_ptr(), second.data_ptr()}
    buffers.release()
    assert len(buffers.take(BUFFER_BYTES + 1)) == BUFFER_BYTES + 1
