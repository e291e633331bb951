"""Memory of the host that a device copies from and to by itself: shared memory that is locked, or buffers that are.

An arena has gigabytes of addresses and pages only where it was touched; locking takes all its pages. So an arena is
locked window by window, where calls name memory, and no more than ``LOCKED_BYTES`` of all arenas: a client chooses
what it names.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from tsqp.untrusted.backends.driver import Driver

WINDOW_BYTES = 64 << 20
LOCKED_BYTES = 8 << 30
BUFFER_BYTES = 1 << 20  # the least that a buffer has: they are used again by payloads of any size

log = logging.getLogger("tsqp.worker")


@dataclass
class _Arena:
    """One connection's memory, uint8 (n,), which it keeps mapped; its windows that are locked, by number."""

    memory: torch.Tensor
    windows: dict[int, torch.Tensor] = field(default_factory=dict)


class Arenas:
    """The shared memory of all connections. Whatever is locked is unlocked before its mapping can go."""

    def __init__(self, driver: Driver, *, window_bytes: int = WINDOW_BYTES, locked_bytes: int = LOCKED_BYTES) -> None:
        self._driver = driver
        self._window_bytes = window_bytes
        self._left_bytes = locked_bytes
        self._arenas: dict[bytes, _Arena] = {}
        self._refused = False
        self._said = False

    def attach(self, peer: bytes, memory: memoryview) -> None:
        """See Backend.attach."""
        if peer not in self._arenas:
            self._arenas[peer] = _Arena(torch.frombuffer(memory, dtype=torch.uint8))

    def detach(self, peer: bytes) -> None:
        """Unlock a connection's memory, in which no copy may be under way, and let go of it."""
        arena = self._arenas.pop(peer, None)
        while arena is not None and arena.windows:
            _, window = arena.windows.popitem()
            self._driver.unregister(window)
            self._left_bytes += window.nbytes

    def close(self) -> None:
        """Detach everything."""
        for peer in list(self._arenas):
            self.detach(peer)

    def pieces(self, memory: memoryview) -> list[torch.Tensor] | None:
        """Locked memory, uint8, in pieces that each lie in one window; None for memory elsewhere, or refused."""
        if not self._arenas or not memory.nbytes or memory.readonly:
            return None
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        for arena in self._arenas.values():
            first = whole.data_ptr() - arena.memory.data_ptr()
            if first >= 0 and first + len(whole) <= len(arena.memory):
                return self._cut(arena, first, first + len(whole))
        return None

    def _cut(self, arena: _Arena, first: int, end: int) -> list[torch.Tensor] | None:
        pieces = []
        size = self._window_bytes
        for number in range(first // size, (end - 1) // size + 1):
            if not self._lock(arena, number):
                return None
            # A copy may not cross from one registration into the next, though they touch.
            pieces.append(arena.memory[max(first, number * size) : min(end, (number + 1) * size)])
        return pieces

    def _lock(self, arena: _Arena, number: int) -> bool:
        if number in arena.windows:
            return True
        window = arena.memory[number * self._window_bytes : (number + 1) * self._window_bytes]
        if self._refused:
            return False
        if window.nbytes > self._left_bytes:
            return self._say("as much is locked as this worker locks")
        refused = self._driver.register(window)
        if refused is not None:
            self._refused = True  # it would cost as much to ask again for each call
            return self._say(refused)
        arena.windows[number] = window
        self._left_bytes -= window.nbytes
        return True

    def _say(self, why: str) -> bool:
        """That memory is not locked, once."""
        if not self._said:
            log.warning("shared memory is not locked (%s): copies go through buffers, which is slower", why)
        self._said = True
        return False


class Buffers:
    """Locked memory of the worker's own, for bytes that lie elsewhere. What a call takes is free again all at once."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._free: list[torch.Tensor] = []
        self._taken: list[torch.Tensor] = []

    @property
    def taken_bytes(self) -> int:
        """What copies may be under way in."""
        return sum(buffer.nbytes for buffer in self._taken)

    def take(self, size: int) -> torch.Tensor:
        """Memory of this size, until ``release``. Raises RuntimeError."""
        fits = [buffer for buffer in self._free if buffer.nbytes >= size]
        if fits:
            buffer = min(fits, key=len)
            self._free = [other for other in self._free if other is not buffer]
        else:
            self._free.clear()  # too small for what is asked for now
            buffer = self._driver.locked(max(size, BUFFER_BYTES))
        self._taken.append(buffer)
        return buffer[:size]

    def release(self) -> None:
        """All that is taken is free again: no copy is under way in it."""
        self.put_back(self.hand_over())

    def hand_over(self) -> list[torch.Tensor]:
        """All that is taken, for ``put_back`` once no copy is under way in it; nothing is taken after this."""
        taken, self._taken = self._taken, []
        return taken

    def put_back(self, buffers: Sequence[torch.Tensor]) -> None:
        """These are free again."""
        self._free += buffers
