"""What is shown while a pool of pads is filled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from rich.filesize import decimal

from tsqp.api.pads import Filling, FillingProgress
from tsqp.progress import Progress


def pads_shown(progress: Progress) -> FillingProgress:
    """Told to ``progress``, as blocks of pads."""
    return lambda filling: progress(f"making pads for {filling.tokens} tokens", filling.ready, filling.wanted)


def pads_lines(tell: Callable[[str], None]) -> FillingProgress:
    """A first and a last line, given to ``tell``."""
    return partial(_say, tell)


def _say(tell: Callable[[str], None], filling: Filling) -> None:
    if filling.ready == 0:
        tell(f"filling pads for {filling.tokens} tokens, {decimal(filling.size)}")
    if filling.ready == filling.wanted:
        tell(f"pads for {filling.tokens} tokens are ready")
