"""Calls under way on a device: the worker begins one while the device is busy with those before it.

Answers are sent in the order in which the calls came, each once all of it is done. What fails is the call that began
it: an error on the way, or what its own event reports. Between two looks at the connections the host asks the device,
and never sleeps: a call takes less time than being woken does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from tsqp.untrusted.backends.base import Queued
from tsqp.wire.channel import Arrival, Frames
from tsqp.wire.device_memory import Payload
from tsqp.wire.messages import Call


class UnderWay(NamedTuple):
    """A call that was begun. ``failure`` is why it has failed already; ``full``: for lack of memory."""

    call: Call
    product: Payload | None
    began_ns: int  # by time.perf_counter_ns
    queued: Queued
    failure: str | None = None
    full: bool = False


class Pipeline:
    """At most ``depth`` calls. ``end`` waits for one and makes its answer, ``send`` sends it."""

    def __init__(self, send: Callable[[Arrival, Frames], None], end: Callable[[UnderWay], Frames], depth: int) -> None:
        self._send, self._end, self._depth = send, end, depth
        self._calls: deque[tuple[Arrival, UnderWay | Frames]] = deque()

    def __len__(self) -> int:
        return len(self._calls)

    def make_room(self) -> None:
        """Wait for the oldest where there is no room for one more."""
        while len(self._calls) >= self._depth:
            self._answer()

    def add(self, arrival: Arrival, begun: UnderWay | Frames) -> None:
        """One more, for which there is room: a call, or an answer that only waits for its turn."""
        self._calls.append((arrival, begun))
        self.look()

    def look(self) -> None:
        """Answer those that are done, in their order."""
        while self._calls and self._is_done(self._calls[0][1]):
            self._answer()

    def drain(self) -> None:
        """Answer all."""
        while self._calls:
            self._answer()

    def _is_done(self, begun: UnderWay | Frames) -> bool:
        return isinstance(begun, Frames) or begun.queued.done()

    def _answer(self) -> None:
        arrival, begun = self._calls.popleft()
        self._send(arrival, begun if isinstance(begun, Frames) else self._end(begun))
