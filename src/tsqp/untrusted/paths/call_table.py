"""The prepared calls of one connection as tables for compiled code; see ``call_loops.py`` and ``product_loops.py``."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import torch

from tsqp.arith.row_threads import RowWork, parts_of
from tsqp.untrusted import product_loops as loops
from tsqp.wire.codec import encode
from tsqp.wire.messages import Linear, Product

KEY_BYTES = 128  # of a packet, without its two numbers: the call of a product has fewer
FIRST_CALLS = 128  # room for so many; then for twice as many, and so on

_WIDE_ID = 2**62 - 1
_WIDE = b"\xcf" + _WIDE_ID.to_bytes(8, "big")  # as MessagePack has it: no other part of a call has these bytes

Array = np.ndarray[Any, np.dtype[Any]]
Room = tuple[Array, Array, Array, Array]
Tables = tuple[Array, Array, Array, Array, Array]


class CallTable:
    """Calls that repeat but for their ids, and what each asks for. Whoever keeps the table keeps their memory."""

    def __init__(self) -> None:
        self.digit_bytes = 0  # the most that a product has of them
        self._kept: list[RowWork] = []
        self._room = _room(FIRST_CALLS)
        self._last = np.zeros(1, np.int64)
        self._tables: Tables | None = None

    def clear(self) -> None:
        """Forget every call, and its memory."""
        self.digit_bytes = 0
        self._kept.clear()
        self._room = _room(FIRST_CALLS)
        self._last[0] = 0
        self._tables = None

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, place: bytes, call: Linear | Product, work: object) -> None:
        """Have a call of memory ``place`` answered by ``work``, if compiled code can do that. Once for each call."""
        product = numbers_of(work) if isinstance(work, RowWork) else None
        control = encode(msgspec.structs.replace(call, id=_WIDE_ID))
        head, _, rest = control.partition(_WIDE)
        key = place + head + rest
        if product is None or not isinstance(work, RowWork) or len(key) > KEY_BYTES:
            return
        at = len(self._kept)
        if at == len(self._room[0]):
            self._room = _room(2 * at, self._room)
        keys, sizes, _, products = self._room
        keys[at, : len(key)] = np.frombuffer(key, np.uint8)
        sizes[at] = len(place) + len(head), len(rest)
        products[at] = product
        self.digit_bytes = max(self.digit_bytes, product[loops.DIGITS] * product[loops.ROWS] * product[loops.INNER])
        self._kept.append(work)
        self._tables = None

    def tables(self) -> Tables:
        """As ``call_loops.serve`` takes them."""
        if self._tables is None:
            keys, sizes, follows, products = (one[: len(self._kept)] for one in self._room)
            self._tables = keys, sizes, follows, self._last, products
        return self._tables


def _room(calls: int, before: Room | None = None) -> Room:
    """Room for so many calls, which begins with what was there before."""
    keys, sizes = np.zeros((calls, KEY_BYTES), np.uint8), np.zeros((calls, 2), np.int64)
    follows, products = np.zeros(calls, np.int64), np.zeros((calls, loops.PRODUCT_NUMBERS), np.int64)
    made = keys, sizes, follows, products
    if before is not None:
        for at, old in enumerate(before):
            made[at][: len(old)] = old
    return made


def numbers_of(work: RowWork) -> list[int] | None:
    """A product as ``product_loops`` has it; None for one that it has no loop for."""
    if work.rows == 0:
        return [0] * loops.PRODUCT_NUMBERS  # nothing to do, by whatever loop
    loop = loops.LOOPS.get(work.loop)
    if loop is None:
        return None
    split = digits = 0
    if loop is loops.digits_loop:
        x, digits, weights, added, out = work.arguments
        split = loops.address_of(loops.split_loop)
    else:
        x, weights, added, out = work.arguments
    parts = parts_of(work.rows, work.least, torch.get_num_threads())
    sizes = [split, loops.address_of(loop), len(x), weights.shape[1], len(weights), digits]
    return [*sizes, _at(x), _at(weights), _at(added), len(added), _at(out), parts]


def _at(array: Array) -> int:
    return int(array.__array_interface__["data"][0])
