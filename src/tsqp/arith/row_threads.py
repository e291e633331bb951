"""Rows of one operation shared out over threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Any

import torch


class RowThreads:
    """As many threads as torch uses. Work is a function that releases the interpreter lock, as compiled kernels do."""

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(max(1, self.threads - 1), thread_name_prefix="tsqp-rows")

    def run(self, work: Callable[..., Any], rows: int, *arguments: Any, least: int) -> None:
        """``work(*arguments, first, end)`` over all rows in equal parts; fewer than ``least`` stay on this thread."""
        parts = min(self.threads, rows) if rows >= least else 1  # waking another thread takes longer than little work
        if parts == 1:
            work(*arguments, 0, rows)
            return
        edges = [rows * part // parts for part in range(parts + 1)]
        others = [self._pool.submit(work, *arguments, edges[i], edges[i + 1]) for i in range(1, parts)]
        try:
            work(*arguments, edges[0], edges[1])
        finally:
            wait(others)  # they write to memory of the caller: none is left behind when another fails
        for other in others:
            other.result()


@cache
def row_threads() -> RowThreads:
    """One for the process, made when it is first needed."""
    return RowThreads()


def least_rows(width: int) -> int:
    """Rows of so many elements from which on one pass over them is worth a second thread."""
    return max(2, (1 << 17) // max(1, width))
