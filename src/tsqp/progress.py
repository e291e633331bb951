"""How far something is that may take long: told by what does it, to whoever shows it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
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
