"""What is shown until an answer begins."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator

import pytest
from rich.console import Console

import tsqp.progress_bar
from tsqp.cli import prompt_bar
from tsqp.cli.prompt_bar import shown_until_first


def terminal(written: io.StringIO) -> Console:
    return Console(file=written, force_terminal=True, force_interactive=True, width=100, _environ={})


def test_a_prompt_that_is_read_is_shown_until_the_answer_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tsqp.progress_bar, "QUIET_S", 0.0)
    monkeypatch.setattr(prompt_bar, "LOOK_S", 0.0)
    written = io.StringIO()

    def answer() -> Iterator[str]:
        while "5 of 9" not in written.getvalue():
            threading.Event().wait(0.001)
        yield "a"
        assert written.getvalue().endswith("\x1b[2K")  # gone before the second is asked for
        yield "b"

    pieces = shown_until_first(answer(), lambda: 5, 9, terminal(written), silent=False)
    assert next(pieces) == "a"
    assert written.getvalue().endswith("\x1b[2K")
    assert list(pieces) == ["b"]
    assert "reading the prompt" in written.getvalue()


def test_an_answer_of_nothing_and_one_that_breaks_off() -> None:
    written = io.StringIO()
    assert list(shown_until_first(iter(()), lambda: 0, 1, terminal(written), silent=True)) == []

    def broken() -> Iterator[str]:
        raise ZeroDivisionError
        yield ""

    with pytest.raises(ZeroDivisionError):
        list(shown_until_first(broken(), lambda: 0, 1, terminal(written), silent=False))
    assert written.getvalue() == ""
    assert "tsqp-progress" not in [thread.name for thread in threading.enumerate()]
