"""What is said while a pool of pads is filled."""

from __future__ import annotations

from tsqp.api.pads import Filling, FillingProgress
from tsqp.cli.pads_bar import pads_lines, pads_shown


def fill(progress: FillingProgress) -> None:
    for ready in (0, 1, 4):
        progress(Filling(ready, 4, 32, 2_500_000))


def test_blocks_are_counted_on_a_terminal() -> None:
    told: list[object] = []
    fill(pads_shown(lambda *words: told.append(words)))
    assert told == [("making pads for 32 tokens", ready, 4) for ready in (0, 1, 4)]


def test_a_log_has_a_first_and_a_last_line() -> None:
    told: list[str] = []
    fill(pads_lines(told.append))
    assert told == ["filling pads for 32 tokens, 2.5 MB", "pads for 32 tokens are ready"]
