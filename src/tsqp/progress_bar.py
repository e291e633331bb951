"""A line on a terminal that says what takes long and how far it is; nothing elsewhere.

Covers: standard output is never written to, and the line is gone at the end, also after Ctrl-C
(tests/test_progress_bar.py, tests/cli/test_progress_terminal.py). Assumes: what else is written to the terminal
meanwhile goes through the same console or through ``sys.stderr``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from tsqp.progress import Progress as Told
from tsqp.progress import unseen

QUIET_S = 2.0  # until something is worth a line

Clock = Callable[[float, Callable[[], None]], Any]  # makes what calls a function after seconds: start(), cancel()


@contextmanager
def progress_bar(console: Console, *, silent: bool = False, clock: Clock = threading.Timer) -> Iterator[Told]:
    """What shows how far the body is, from ``QUIET_S`` after it is first told something.

    Once the body has ended, what it is told is shown no more.
    """
    if silent or not console.is_interactive:  # no terminal, or one that cannot take a line back
        yield unseen
        return
    line = _Line(console, clock)
    try:
        yield line
    finally:
        line.end()


class _Line:
    """See Told. One thread tells; the timer's starts the line."""

    def __init__(self, console: Console, clock: Clock) -> None:
        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), _Bar(), _Steps(), TimeElapsedColumn()
        # Standard output is the answer's: it is never redirected into the line's console.
        self._bar = Progress(*columns, console=console, transient=True, redirect_stdout=False)
        self._task = self._bar.add_task("", total=None)
        self._what = ""
        self._timer = clock(QUIET_S, self._show)
        self._timer.daemon = True
        self._ended = False
        self._lock = threading.Lock()  # of the start and the end

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        if self._ended:
            return
        if what != self._what:
            self._bar.reset(self._task, description=what)  # its seconds begin again
            if not self._what:
                self._timer.start()
            self._what = what
        self._bar.tasks[0].total = total or None  # update() would keep what was known before
        self._bar.update(self._task, completed=done)

    def _show(self) -> None:
        with self._lock:
            if not self._ended:
                self._bar.start()

    def end(self) -> None:
        """The line goes."""
        with self._lock:
            self._ended = True
        self._timer.cancel()
        self._bar.stop()


class _Bar(BarColumn):
    """Nothing where nobody knows how much there is to do."""

    def render(self, task: Task) -> Any:
        return Text("") if task.total is None else super().render(task)


class _Steps(ProgressColumn):
    """How many are done of how many."""

    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.completed:.0f} of {task.total:.0f}")
