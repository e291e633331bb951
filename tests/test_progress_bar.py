"""The line that says what takes long: when it is there, what it says, and that it goes."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest
from rich.console import Console

from tsqp.progress import Progress, counted, unseen
from tsqp.progress_bar import QUIET_S, progress_bar

EMPTY_LINE = "\x1b[2K"


class Clock:
    """A timer that goes off when the test says so."""

    daemon = False

    def __init__(self) -> None:
        self.started: list[float] = []
        self._then: Callable[[], None] = lambda: None
        self._seconds = 0.0

    def __call__(self, seconds: float, then: Callable[[], None]) -> Clock:
        self._seconds, self._then = seconds, then
        return self

    def start(self) -> None:
        self.started.append(self._seconds)

    def cancel(self) -> None:
        """Nothing waits."""

    def strike(self) -> None:
        assert self.started
        self._then()


def terminal(written: io.StringIO) -> Console:
    return Console(file=written, force_terminal=True, force_interactive=True, width=100, _environ={})


def shown(body: Callable[[Progress, Clock], None], *, silent: bool = False) -> str:
    written, clock = io.StringIO(), Clock()
    with progress_bar(terminal(written), silent=silent, clock=clock) as progress:
        body(progress, clock)
    return written.getvalue()


def test_what_is_done_and_how_far_it_is_are_shown_after_a_while() -> None:
    def body(progress: Progress, clock: Clock) -> None:
        progress("reading", 3, 7)
        clock.strike()
        progress("reading", 4, 7)

    text = shown(body)
    assert "reading" in text
    assert "3 of 7" in text
    assert "0:00:0" in text
    assert text.endswith(EMPTY_LINE)  # and then it is gone


def test_what_is_over_soon_is_not_shown() -> None:
    assert shown(lambda progress, _: progress("reading", 3, 7)) == ""
    assert shown(lambda progress, clock: None) == ""


def test_the_wait_is_counted_from_the_first_word_on() -> None:
    def body(progress: Progress, clock: Clock) -> None:
        assert clock.started == []
        for what in ("one", "two"):
            progress(what)
        assert clock.started == [QUIET_S]

    shown(body)


def test_no_number_is_shown_where_nobody_knows_it() -> None:
    def body(progress: Progress, clock: Clock) -> None:
        progress("reading", 3, 7)
        progress("waiting for [somebody]")
        clock.strike()

    text = shown(body)
    assert "waiting for [somebody]" in text  # as it is: no markup
    assert " of " not in text
    assert "━" not in text


def test_a_timer_that_comes_too_late_shows_nothing() -> None:
    written, clock = io.StringIO(), Clock()
    with progress_bar(terminal(written), clock=clock) as progress:
        progress("reading")
    clock.strike()
    progress("reading on", 1, 2)
    assert written.getvalue() == ""


def test_after_an_interrupt_the_line_is_gone_and_the_cursor_there() -> None:
    written, clock = io.StringIO(), Clock()

    def interrupted() -> None:
        with progress_bar(terminal(written), clock=clock) as progress:
            progress("reading")
            clock.strike()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert written.getvalue().endswith(EMPTY_LINE)
    assert written.getvalue().rindex("\x1b[?25h") > written.getvalue().rindex("\x1b[?25l")


def test_standard_output_is_not_touched(capsys: pytest.CaptureFixture[str]) -> None:
    def body(progress: Progress, clock: Clock) -> None:
        before = sys.stdout
        progress("reading")
        clock.strike()
        assert sys.stdout is before
        sys.stdout.write("answer")

    assert "answer" not in shown(body)
    assert capsys.readouterr().out == "answer"


def test_silent_is_silent() -> None:
    def body(progress: Progress, clock: Clock) -> None:
        assert progress is unseen

    assert shown(body, silent=True) == ""


@pytest.mark.parametrize("kind", ["pipe", "dumb"])
def test_elsewhere_nothing_is_shown(kind: str) -> None:
    written = io.StringIO()
    environ = {"TERM": "dumb"} if kind == "dumb" else {}
    console = Console(file=written, force_terminal=kind == "dumb", _environ=environ)
    with progress_bar(console) as progress:
        assert progress is unseen
    assert written.getvalue() == ""


def test_counted_tells_before_each() -> None:
    told: list[object] = []
    told.extend(counted(["a", "b"], "reading", lambda *words: told.append(words)))
    assert told == [("reading", 0, 2), "a", ("reading", 1, 2), "b"]
