"""A progress bar on a terminal, and nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def watched(items: Iterable[T], console: Console, description: str, total: int | None = None) -> Iterable[T]:
    """The items, with a bar that advances with them and is gone at the end."""
    return track(items, description, total=total, console=console, transient=True, disable=not console.is_terminal)
