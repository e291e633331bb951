"""Memory for one call after another; see ``Channel.slot``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from tsqp.config.groups import GroupKey

KEPT_ROWS = 16  # memory for more rows is not kept: a decode step has no use for it


class Slot:
    """Memory for calls of one shape, one at a time: ``tensor`` is sent, ``reply_bytes`` come back. Laid out once."""

    def __init__(self, tensor: memoryview, reply_bytes: int) -> None:
        self.tensor = tensor
        self.reply_bytes = reply_bytes


class Desk(Protocol):
    """All memory of one call: its slot, and what a side has around it. ``key`` is of a group of its shape."""

    key: GroupKey
    rows: int
    x: Any  # what is handed out to be filled


D = TypeVar("D", bound=Desk)


class Shelf(Generic[D]):
    """Desks, each for one call at a time: whoever has one gives it back once, and nobody else has it until then."""

    def __init__(self, make: Callable[[GroupKey, int], D]) -> None:
        self._make = make
        self._idle: defaultdict[str, list[D]] = defaultdict(list)  # by the name of their group
        self._handed_out: dict[int, D] = {}  # by the identity of their x, which they keep alive

    def hand_out(self, key: GroupKey, rows: int) -> D:
        """A desk that nobody has, for the input of a call; ``claim`` finds it by its x."""
        idle, desk = self._idle[key[0]], None
        while idle and (desk is None or desk.rows != rows):  # those of other rows are let go: rows seldom change
            desk = idle.pop()
        if desk is None or desk.rows != rows:
            desk = self._make(key, rows)
        self._handed_out[id(desk.x)] = desk
        return desk

    def claim(self, key: GroupKey, x: Any) -> D | None:
        """The desk whose x was handed out for a group of that name. None for other memory, and a second time."""
        desk = self._handed_out.pop(id(x), None)
        return None if desk is None or desk.key[0] != key[0] else desk

    def fresh(self, key: GroupKey, rows: int) -> D:
        """A desk that nobody has, for a call whose input lies elsewhere."""
        return self._handed_out.pop(id(self.hand_out(key, rows).x))

    def clear(self) -> None:
        """Let go of every desk that is not at work."""
        self._idle.clear()
        self._handed_out.clear()

    def put_back(self, desk: D) -> None:
        """The call is over, and nobody looks at what it has left."""
        if desk.rows <= KEPT_ROWS:
            self._idle[desk.key[0]].append(desk)
