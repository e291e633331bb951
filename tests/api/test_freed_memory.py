"""Memory that was freed goes back to the system, also below what is still in use in the heap of a thread."""

from __future__ import annotations

import platform
import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tsqp.api.freed_memory import give_back_freed_memory

PIECE_BYTES = 40_000  # as much as the pads of a layer
PIECES = 1000


def anonymous_bytes() -> int:
    """What this process holds of memory of its own."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc here: another C library has other rules")
def test_freed_pieces_below_one_in_use_are_given_back() -> None:
    pieces: list[NDArray[np.uint8]] = []

    def make() -> None:
        pieces.extend(np.ones(PIECE_BYTES, np.uint8) for _ in range(PIECES))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    in_use = pieces[::50]
    pieces.clear()
    before = anonymous_bytes()
    give_back_freed_memory()
    assert before - anonymous_bytes() > PIECES * PIECE_BYTES // 2
    assert all(piece.all() for piece in in_use)


def test_another_c_library_has_nothing_to_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    give_back_freed_memory()
