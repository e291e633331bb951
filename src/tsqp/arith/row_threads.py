"""Rows of one operation shared out over threads."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

import torch


class RowThreads:
    """As many threads as torch uses. Work is a function that releases the interpreter lock, as compiled kernels do."""

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self._parts: SimpleQueue[_Part] = SimpleQueue()
        for number in range(1, self.threads):
            Thread(target=self._serve, name=f"tsqp-rows-{number}", daemon=True).start()

    def run(self, work: Callable[..., Any], rows: int, *arguments: Any, least: int) -> None:
        """``work(*arguments, first, end)`` over all rows in equal parts; fewer than ``least`` stay on this thread."""
        parts = min(self.threads, rows) if rows >= least else 1  # waking another thread takes longer than little work
        if parts == 1:
            work(*arguments, 0, rows)
            return
        edges = [rows * part // parts for part in range(parts + 1)]
        others: list[_Part] = []
        try:
            for i in range(1, parts):
                other = _Part(work, (*arguments, edges[i], edges[i + 1]))
                self._parts.put(other)
                others.append(other)
            work(*arguments, edges[0], edges[1])
        finally:
            errors = [other.wait() for other in others]
        for error in errors:
            if error is not None:
                raise error

    def _serve(self) -> None:
        while True:
            self._parts.get().do()


class _Part:
    """Rows for another thread. One lock passes between: an executor's futures take 30 µs more, in a cold cache."""

    def __init__(self, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._job: tuple[Callable[..., Any], tuple[Any, ...]] | None = (work, arguments)
        self._error: BaseException | None = None
        self._done = Lock()
        self._done.acquire()

    def do(self) -> None:
        """Do it, once."""
        job, self._job = self._job, None  # so that no thread keeps memory of the last work
        try:
            if job is not None:
                work, arguments = job
                work(*arguments)
        except BaseException as error:
            self._error = error
        finally:
            job = work = arguments = None  # type: ignore[assignment]
            self._done.release()

    def wait(self) -> BaseException | None:
        """Until it is done, whatever interrupts: it writes to memory of the caller. What it has raised."""
        interrupted = None
        while True:
            try:
                self._done.acquire()
                return self._error or interrupted
            except BaseException as error:
                interrupted = error


@cache
def row_threads() -> RowThreads:
    """One for the process, made when it is first needed."""
    return RowThreads()


def least_rows(width: int) -> int:
    """Rows of so many elements from which on one pass over them is worth a second thread."""
    return max(2, (1 << 17) // max(1, width))
