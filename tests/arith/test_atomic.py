"""Words that threads change at once lose nothing."""

from __future__ import annotations

from threading import Thread
from typing import Any

import numpy as np

from tsqp.arith.atomic import add, load, replace, store
from tsqp.arith.jit import kernel

TURNS = 50_000


@kernel
def _one_by_one(word, ours):  # type: ignore[no-untyped-def]
    """Take TURNS from a word while it has any, and count them; in turns with adding nothing to it."""
    address = word.ctypes.data
    while True:
        left = load(address)
        if left == 0:
            return
        if replace(address, left, left - 1):
            ours[0] += 1
        add(address, np.int64(0))


@kernel
def _set(word, value):  # type: ignore[no-untyped-def]
    store(word.ctypes.data, value)
    return add(word.ctypes.data, np.int64(2)), load(word.ctypes.data), replace(word.ctypes.data, value, np.int64(0))


def test_every_turn_is_taken_once() -> None:
    word = np.zeros(1, np.int64)
    counts = np.zeros((3, 8), np.int64)
    _one_by_one(word, counts[0])  # compiles
    word[0] = TURNS
    threads = [Thread(target=_one_by_one, args=(word, count)) for count in counts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert word[0] == 0
    assert counts[:, 0].sum() == TURNS


def test_what_they_say() -> None:
    word = np.zeros(1, np.int64)
    found: Any = _set(word, np.int64(5))
    assert tuple(found) == (5, 7, False)
    assert word[0] == 7
