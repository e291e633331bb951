"""Threads beside the one that makes a decode step; ``arith/crew.py`` says how they share its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread
from typing import Any

from tsqp.arith.bits import Array
from tsqp.arith.crew import dismiss, new_board

_Task = tuple[Callable[..., Any], Array, int, tuple[Any, ...]]


class Helpers:
    """``count`` threads, made when they are first needed. They keep what a step gives them until it is over."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._queues: list[SimpleQueue[_Task | None]] = []

    @contextmanager
    def beside(self, loop: Callable[..., Any], arguments: tuple[Any, ...], *, rows: int) -> Iterator[Array]:
        """A board for a step; ``loop(board, number, *arguments)`` runs in each of them meanwhile.

        Nobody waits for a thread that has not begun, or has not yet seen that the step is over: it takes no row any
        more, and the next step has a board of its own. One row is nothing to share.
        """
        board = new_board(self._count if rows > 1 else 0)
        if rows > 1:
            self._start()
            for number, queue in enumerate(self._queues, 1):
                queue.put((loop, board, number, arguments))
        try:
            yield board
        finally:
            dismiss(board)

    def close(self) -> None:
        """End the threads; new ones are made if another step comes. Closing twice is allowed."""
        for queue in self._queues:
            queue.put(None)
        self._queues.clear()

    def _start(self) -> None:
        while len(self._queues) < self._count:
            queue = SimpleQueue[_Task | None]()
            self._queues.append(queue)
            Thread(target=_serve, args=(queue,), name=f"tsqp-step-{len(self._queues)}", daemon=True).start()


def _serve(queue: SimpleQueue[_Task | None]) -> None:
    while (task := queue.get()) is not None:
        loop, board, number, arguments = task
        loop(board, number, *arguments)
        del task, loop, board, arguments  # so that no memory of a step is kept
