"""What is shown while a pool of pads is filled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress

from tsqp.api.pads import Filling, FillingProgress


@contextmanager
def pads_bar(console: Console) -> Iterator[FillingProgress]:
    """What shows a pool being filled: on a terminal a bar that goes at the end, elsewhere a first and a last line."""
    if not console.is_terminal:
        yield pads_lines(lambda line: console.print(line, style="dim", soft_wrap=True))
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("making pads", total=None, visible=False)
        yield lambda filling: bar.update(task, completed=filling.ready, total=filling.wanted, visible=True)


def pads_lines(tell: Callable[[str], None]) -> FillingProgress:
    """A first and a last line, given to ``tell``."""
    return partial(_say, tell)


def _say(tell: Callable[[str], None], filling: Filling) -> None:
    if filling.ready == 0:
        tell(f"filling pads for {filling.tokens} tokens, {decimal(filling.size)}")
    if filling.ready == filling.wanted:
        tell(f"pads for {filling.tokens} tokens are ready")
