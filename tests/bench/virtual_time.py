"""An asyncio loop whose clock moves only when there is nothing else to do: waits take no time, and exactly as long."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Selector(selectors.SelectSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "all tasks wait, and for no time"
            self.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """``hold_up``: what the process does meanwhile takes time, in which the loop runs nothing."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now

    def hold_up(self, seconds: float) -> None:
        self._virtual.now += seconds


def hold_up(seconds: float) -> None:
    """Time passes, and the running loop does nothing."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.hold_up(seconds)


def run(work: Coroutine[Any, Any, T]) -> T:
    """What the coroutine returns."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
