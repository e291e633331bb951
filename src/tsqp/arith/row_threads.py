"""Rows of one operation shared out over threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

import torch

PARTS = 4  # of each thread's share, where that is worth while: threads that lose their core take fewer


class RowThreads:
    """As many threads as torch uses. Work is a function that releases the interpreter lock, as compiled kernels do."""

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self._calls: SimpleQueue[_Call] = SimpleQueue()
        for number in range(1, self.threads):
            Thread(target=self._serve, name=f"tsqp-rows-{number}", daemon=True).start()

    def run(self, work: Callable[..., Any], rows: int, *arguments: Any, least: int) -> None:
        """``work(*arguments, first, end)`` over all rows, in about equal parts.

        Fewer than ``least`` rows stay on this thread. Threads take one part after another; this one begins at once, and
        waits for no other that has not begun. After a failure no part is begun any more; the failure is raised when
        those under way have ended.
        """
        parts = parts_of(rows, least, self.threads)
        if parts == 1:
            work(*arguments, 0, rows)
            return
        job = _Job(work, arguments, rows, parts)
        calls: list[_Call] = []
        try:
            for _ in range(1, min(self.threads, parts)):
                calls.append(_Call(job))
                self._calls.put(calls[-1])
            job.do()
        finally:
            job.end()
            errors = [call.wait() for call in calls]
        for error in errors:
            if error is not None:
                raise error

    def _serve(self) -> None:
        while True:
            self._calls.get().answer()


class _Job:
    """The parts of one operation: each is taken once, by whoever comes first."""

    def __init__(self, work: Callable[..., Any], arguments: tuple[Any, ...], rows: int, parts: int) -> None:
        self._work: Callable[..., Any] | None = work
        self._arguments = arguments
        edges = [rows * part // parts for part in range(parts + 1)]
        self._parts = deque(pairwise(edges))

    def do(self) -> None:
        """Do parts as long as there are any. A failure ends the job."""
        work, arguments = self._work, self._arguments
        try:
            while work is not None and (part := self._next()) is not None:
                work(*arguments, *part)
        except BaseException:
            self._parts.clear()
            raise

    def _next(self) -> tuple[int, int] | None:
        try:
            return self._parts.popleft()
        except IndexError:
            return None

    def end(self) -> None:
        """No part is begun any more, and no memory kept of the work."""
        self._parts.clear()
        self._work, self._arguments = None, ()


class _Call:
    """Asks another thread for help. One lock passes between: an executor's futures take 30 µs more, in a cold cache."""

    def __init__(self, job: _Job) -> None:
        self._job: _Job | None = job
        self._begun = False
        self._error: BaseException | None = None
        self._done = Lock()
        self._done.acquire()

    def answer(self) -> None:
        """Help, once."""
        self._begun = True  # before a part is taken: see `wait`
        try:
            if self._job is not None:
                self._job.do()
        except BaseException as error:
            self._error = error
        finally:
            self._job = None  # so that no thread keeps memory of the last work
            self._done.release()

    def wait(self) -> BaseException | None:
        """Until nobody helps any more, whatever interrupts: parts write to memory of the caller. What was raised."""
        if not self._begun:  # who begins now finds no part: the job has ended
            return None
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


@dataclass(frozen=True)
class RowWork:
    """What ``RowThreads.run`` is to do, with memory that stays: to be called, or done by code that has threads itself.

    ``loop(*arguments, first, end)`` over ``rows``, of which fewer than ``least`` are too few to be shared.
    """

    loop: Callable[..., Any]
    rows: int
    arguments: tuple[Any, ...]
    least: int

    def __call__(self) -> None:
        row_threads().run(self.loop, self.rows, *self.arguments, least=self.least)


def parts_of(rows: int, least: int, threads: int) -> int:
    """In how many parts threads share rows; 1: they do not, since waking another takes longer than little work."""
    if rows < max(2, least) or threads == 1:
        return 1
    return min(PARTS * threads, max(threads, 2 * rows // least), rows)


def least_rows(width: int) -> int:
    """Rows of so many elements from which on one pass over them is worth a second thread."""
    return max(2, (1 << 17) // max(1, width))
