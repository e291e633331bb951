"""Spans of time, recorded while a run goes on, for ``--trace``. Names, sizes and times only: no values, no tokens."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

# pass: a forward pass. operator: a trusted operator. line: this side busy with, or waiting for, a call.
# call: a call under way, from sending it to holding its product.
Track = Literal["pass", "operator", "line", "call"]


class TraceSpan(NamedTuple):
    """One stretch of time, in seconds of ``time.perf_counter``."""

    track: Track
    name: str
    start_s: float
    end_s: float
    details: dict[str, Any]


class Trace:
    """What happened, in the order it ended. Grows by a few hundred bytes per span, a few hundred spans per pass."""

    def __init__(self) -> None:
        self.spans: list[TraceSpan] = []

    def add(self, track: Track, name: str, start_s: float, end_s: float, **details: Any) -> None:
        """Record one span that has ended."""
        self.spans.append(TraceSpan(track, name, start_s, end_s, details))
