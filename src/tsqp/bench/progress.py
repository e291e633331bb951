"""A progress bar on a terminal, and nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, track

T = TypeVar("T")


def watched(items: Iterable[T], console: Console, description: str, total: int | None = None) -> Iterable[T]:
    """The items, with a bar that advances with them and is gone at the end."""
    return track(items, description, total=total, console=console, transient=True, disable=not console.is_terminal)


class Steps:
    """The bar of a measurement that has many steps of several kinds."""

    def __init__(self, bar: Progress, total: int) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=total)

    def begin(self, what: str) -> None:
        """Say what is being done."""
        self._bar.update(self._task, description=what)

    def done(self) -> None:
        """One step further."""
        self._bar.advance(self._task)


@contextmanager
def steps(console: Console, total: int) -> Iterator[Steps]:
    """A bar of ``total`` steps that says what the present one is, on a terminal; nothing elsewhere."""
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield Steps(bar, total)
