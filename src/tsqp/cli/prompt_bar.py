"""What is shown while a prompt is read, before its answer begins."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console

from tsqp.progress_bar import progress_bar

LOOK_S = 0.25  # how often it is looked at

T = TypeVar("T")


def shown_until_first(
    pieces: Iterator[T], done: Callable[[], int], total: int, console: Console, *, silent: bool
) -> Iterator[T]:
    """The pieces of an answer; on a terminal, until the first is there, how many tokens of its prompt are ``done``."""
    with (
        progress_bar(console, silent=silent) as progress,
        _meanwhile(lambda: progress("reading the prompt", min(done(), total), total)),
    ):
        first = next(pieces, None)
    if first is not None:
        yield first
        yield from pieces


@contextmanager
def _meanwhile(look: Callable[[], None]) -> Iterator[None]:
    """Another thread looks, while the body waits."""
    over = threading.Event()

    def watch() -> None:
        look()
        while not over.wait(LOOK_S):
            look()

    thread = threading.Thread(target=watch, name="tsqp-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
