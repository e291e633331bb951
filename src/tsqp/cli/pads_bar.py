"""What is shown while a pool of pads is filled."""

from __future__ import annotations

from collections.abc import Iterator
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
        yield partial(_say, console)
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("making pads", total=None, visible=False)
        yield lambda filling: bar.update(task, completed=filling.ready, total=filling.wanted, visible=True)


def _say(console: Console, filling: Filling) -> None:
    if filling.ready == 0:
        console.print(f"filling pads for {filling.tokens} tokens, {decimal(filling.size)}", style="dim", soft_wrap=True)
    if filling.ready == filling.wanted:
        console.print(f"pads for {filling.tokens} tokens are ready", style="dim", soft_wrap=True)
