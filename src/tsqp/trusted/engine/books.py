"""The books of an engine: which requests have not ended, what they hold, and which of them are to end.

One lock, held for an instant. ``end_soon`` never waits for it: a finaliser may call that in the middle of anything.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from tsqp.trusted.engine.counts import Counts
from tsqp.trusted.engine.request import FinishReason, Output, Request
from tsqp.trusted.engine.scheduler import Scheduler, Shares


class ReservesPads(Protocol):
    """Pads that are promised to requests before they begin; see ``PadReserve``. ``most``: rows, at once."""

    @property
    def most(self) -> int: ...

    def reserve(self, rows: int) -> None: ...

    def release(self, rows: int) -> None: ...


class Books:
    """``scheduler``: makes its decisions within ``open``. ``pads``: where requests reserve them, if they do."""

    def __init__(self, scheduler: Scheduler, pads: ReservesPads | None) -> None:
        self.scheduler = scheduler
        self._pads = pads
        self._numbers = 0
        self._refused = 0
        self._ends = deque[tuple[int, FinishReason]]()  # asked for, and not yet in the books
        self._lock = threading.Lock()

    @contextmanager
    def open(self) -> Iterator[Scheduler]:
        """Holds the lock; what was to end meanwhile has ended afterwards."""
        try:
            with self._lock:
                yield self.scheduler
        finally:
            self._end_those_asked_for()

    @property
    def most_promised(self) -> int | None:
        """Rows that pads can be promised to at once; None where none are promised."""
        return None if self._pads is None else self._pads.most

    def counts(self) -> Counts:
        """All numbers, of one moment."""
        with self.open() as scheduler:
            counts = scheduler.counts()
            return replace(counts, refused=self._refused, ended=dict(counts.ended))

    def add(self, request: Request) -> int:
        """Put a request into the queue, its pads reserved; its number. Raises InputError, QueueFull, PadsExhausted."""
        with self.open() as scheduler:
            self._refused += 1  # unless nothing is raised
            scheduler.check(request)
            if self._pads is not None:
                self._pads.reserve(request.end - 1)
                request.pads = request.end - 1
            request.id = self._numbers
            scheduler.add(request)
            self._numbers += 1
            self._refused -= 1
        return request.id

    def reserve(self, rows: int) -> None:
        """Reserve pads for rows of no request; see ``ReservesPads``."""
        if self._pads is not None:
            with self.open():
                self._pads.reserve(rows)

    def release(self, rows: int) -> None:
        """Give back what ``reserve`` has reserved."""
        if self._pads is not None:
            with self.open():
                self._pads.release(rows)

    def begin_step(self) -> tuple[Shares, list[Request], dict[Request, int]]:
        """The next pass; whose beginnings to copy before; and of all these what was computed, for ``end_step``."""
        with self.open() as scheduler:
            shares = scheduler.plan()
            copies = scheduler.to_copy()
            held = {request: request.computed for request in (*shares, *copies)}
            for request in held:
                request.under_way = True
            return shares, copies, held

    def end_step(self, held: dict[Request, int], given: dict[Request, Output]) -> None:
        """What has become of the requests of a step, whole or not."""
        with self.open() as scheduler:
            for request, before in held.items():
                rows, output = request.computed - before, given.get(request)
                request.under_way = False
                scheduler.count(request, rows, new_tokens=output is not None and output.token is not None)
                self._unreserve(request, rows)
                ended = output.finish_reason if output is not None else None
                reason = ended if ended == "error" else request.asked_to_end or ended
                if reason is not None:
                    self._end(request, reason)
                elif not request.rest:  # interrupted before its token was chosen: computed again, with the same logits
                    scheduler.preempt(request)

    def end_all(self, reason: FinishReason) -> list[Request]:
        """End every request; those that have ended by this."""
        with self.open() as scheduler:
            requests = list(scheduler.unended())
            for request in requests:
                self._end(request, reason)
        return requests

    def end_soon(self, number: int, reason: FinishReason) -> None:
        """End a request, at once or after the step that it is in; one that has ended already is left alone."""
        self._ends.append((number, reason))
        self._end_those_asked_for()

    def _end(self, request: Request, reason: FinishReason) -> None:
        """A request ends and holds nothing any more; the lock is held."""
        self._unreserve(request, request.pads)
        self.scheduler.end(request, reason)

    def _unreserve(self, request: Request, rows: int) -> None:
        """Pads that a request has used, or will not need."""
        rows = min(rows, request.pads)
        if self._pads is not None and rows:
            self._pads.release(rows)
            request.pads -= rows

    def _end_those_asked_for(self) -> None:
        """Without waiting: whoever holds the lock comes here once it is free, and finds what was put there before."""
        while self._ends and self._lock.acquire(blocking=False):
            try:
                while self._ends:
                    number, reason = self._ends.popleft()
                    request = self.scheduler.get(number)
                    if request is not None and request.under_way:
                        request.asked_to_end = request.asked_to_end or reason
                    elif request is not None:
                        self._end(request, reason)
            finally:
                self._lock.release()
