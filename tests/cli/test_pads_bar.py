"""What is shown while a pool of pads is filled."""

from __future__ import annotations

import io

from rich.console import Console

from tsqp.api.pads import Filling
from tsqp.cli.pads_bar import pads_bar


def shown(*, terminal: bool) -> str:
    """What a user sees of a pool of four blocks being filled."""
    written = io.StringIO()
    with pads_bar(Console(file=written, force_terminal=terminal, width=30)) as progress:
        for ready in (0, 1, 4):
            progress(Filling(ready, 4, 32, 2_500_000))
    return written.getvalue()


def test_a_bar_is_drawn_on_a_terminal() -> None:
    assert "making pads" in shown(terminal=True)
    assert "filling" not in shown(terminal=True)


def test_elsewhere_there_is_a_first_and_a_last_line() -> None:
    assert shown(terminal=False).splitlines() == [
        "filling pads for 32 tokens, 2.5 MB",
        "pads for 32 tokens are ready",
    ]
