"""How far something is that may take long: told by what does it, to whoever shows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Is told what is being done, and that ``done`` steps of ``total`` are; 0 of 0 where nobody can tell."""

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None: ...


def unseen(what: str, done: int = 0, total: int = 0) -> None:
    """For who shows nothing."""


def counted(items: Collection[T], what: str, progress: Progress) -> Iterator[T]:
    """The items; before each, how many are done."""
    for done, item in enumerate(items):
        progress(what, done, len(items))
        yield item


class Timings:
    """A Progress that tells another one, and keeps how long each thing took: ``seconds``, by what was said of it."""

    def __init__(self, told: Progress, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._told, self._clock = told, clock
        self._what, self._since = "", clock()

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        if what != self._what:
            self.end()
            self._what = what
        self._told(what, done, total)

    def end(self) -> None:
        """What was told last is over."""
        now = self._clock()
        if self._what:
            self.seconds[self._what] = self.seconds.get(self._what, 0.0) + now - self._since
        self._what, self._since = "", now
