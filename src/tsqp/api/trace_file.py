"""A run's trace as a file for Perfetto or chrome://tracing, and the share of the time that communication took.

The worker's lanes rest on what the worker says about itself: how long it computed each call. When exactly it did so is
not known here; each stretch is drawn as early as it can have been, one after the other. A device that copies and
computes at the same time says of each call when its stages began and ended; they are drawn as late as they can have
been, because an answer is sent as soon as the last of them is over.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tsqp.errors import OptionError
from tsqp.trusted.trace import Trace, TraceSpan, Track

Interval = tuple[float, float]  # start and end, seconds

TRUSTED, WIRE, WORKER = 1, 2, 3  # process ids of the file, one for each group of lanes
STAGES = "copying in", "computing", "copying out"
COMPUTING = 1
GROUPS = {TRUSTED: "trusted side", WIRE: "wire", WORKER: "worker"}


class Lane(NamedTuple):
    """A row of the picture: spans that never overlap."""

    group: int
    title: str
    spans: list[TraceSpan]


def communication_share(trace: Trace, passes: str | None = None) -> float | None:
    """1 − (trusted time + worker's kernel time) / wall, over the forward passes; None when there was none.

    ``passes`` picks ``prefill`` or ``decode``; None takes both.

    Time is communication when this side sends, waits or takes in a reply, no operator of its own runs meanwhile and
    the worker does not compute either. Where the two sides overlap, the common time is counted once.
    """
    wall = _merged((span.start_s, span.end_s) for span in _of(trace, "pass") if passes in (None, span.name))
    if not wall:
        return None
    line = _merged((span.start_s, span.end_s) for span in _of(trace, "line"))
    line = _without(line, _without(line, wall))  # what of it lies within the passes
    computing = _merged((span.start_s, span.end_s) for span in [*_of(trace, "operator"), *worker_spans(trace)])
    return _length(_without(line, computing)) / _length(wall)


def worker_spans(trace: Trace) -> list[TraceSpan]:
    """When the worker computed, as far as can be known: after a call was sent and the one before it was done."""
    sent_s = {span.details["id"]: span.end_s for span in _of(trace, "line") if span.name == "send"}
    spans: list[TraceSpan] = []
    free_s = 0.0
    for call in sorted(_of(trace, "call"), key=lambda span: span.details["id"]):
        if "stages_ns" in call.details:
            spans.append(stage_span(call, COMPUTING))
            free_s = max(free_s, spans[-1].end_s)
            continue
        busy_s = call.details["busy_s"]
        # Sending may return after the worker has begun: never later than what leaves room for its own figure.
        latest_s = min(sent_s.get(call.details["id"], call.start_s), call.end_s - busy_s)
        start_s = max(free_s, call.start_s, latest_s)
        free_s = min(start_s + busy_s, call.end_s)
        if free_s > start_s:
            spans.append(TraceSpan("call", call.name, start_s, free_s, call.details))
        free_s = max(free_s, start_s)
    return spans


def stage_span(call: TraceSpan, stage: int) -> TraceSpan:
    """One of ``STAGES`` of a call whose worker told of them, within the call whatever the worker says."""
    told = call.details["stages_ns"]
    last_s = max(end for _, end in told) * 1e-9
    begin_s, end_s = (
        min(max(call.end_s - last_s + told_ns * 1e-9, call.start_s), call.end_s) for told_ns in told[stage]
    )
    return TraceSpan("call", call.name, begin_s, max(begin_s, end_s), call.details)


def lanes(trace: Trace) -> list[Lane]:
    """Every lane of the picture, top to bottom. Calls under way together take a lane each."""
    return [
        Lane(TRUSTED, "forward passes", _of(trace, "pass")),
        Lane(TRUSTED, "operators", _of(trace, "operator")),
        Lane(TRUSTED, "send, wait, take in", _of(trace, "line")),
        *(Lane(WIRE, f"calls under way {i + 1}", spans) for i, spans in enumerate(_side_by_side(_of(trace, "call")))),
        *_worker_lanes(trace),
    ]


def _worker_lanes(trace: Trace) -> list[Lane]:
    """One lane for each stage, where the worker told of them; else one alone."""
    staged = [call for call in _of(trace, "call") if "stages_ns" in call.details]
    if not staged:
        return [Lane(WORKER, "computing, as it says", worker_spans(trace))]
    of_stages = [[stage_span(call, stage) for call in staged] for stage in range(len(STAGES))]
    of_stages[COMPUTING] = worker_spans(trace)  # of calls that are one stretch, too
    return [
        Lane(WORKER, f"{name}, as it says", lane)
        for name, spans in zip(STAGES, of_stages, strict=True)
        for lane in _side_by_side(spans)
    ]


def write_trace(trace: Trace, path: Path) -> None:
    """Write Chrome's trace format: complete events, times in microseconds from the first. Raises OSError."""
    path.write_text(json.dumps({"traceEvents": events(trace), "displayTimeUnit": "ms"}) + "\n", encoding="utf-8")


def check_output(option: str, path: Path | None, suffix: str | None = None) -> None:
    """Refuse a file that could not be written later, before minutes are spent. Raises OptionError."""
    if path is None:
        return
    if suffix is not None and path.suffix.lower() != suffix:
        raise OptionError(f"{option} writes a {suffix} file; {path} is not named like one")
    if path.is_dir() or not path.parent.is_dir():
        raise OptionError(f"{option}: {path} cannot be written: there is no such directory, or it is one")


def events(trace: Trace) -> list[dict[str, Any]]:
    """The ``traceEvents`` of the file: names of groups and lanes first."""
    zero_s = min((span.start_s for span in trace.spans), default=0.0)
    rows: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": group, "tid": 0, "args": {"name": title}}
        for group, title in GROUPS.items()
    ]
    for number, lane in enumerate(lanes(trace), start=1):
        place = {"pid": lane.group, "tid": number}
        rows.append({"ph": "M", "name": "thread_name", **place, "args": {"name": lane.title}})
        for span in sorted(lane.spans, key=lambda span: span.start_s):
            start_us, end_us = (round((time_s - zero_s) * 1e6, 3) for time_s in (span.start_s, span.end_s))
            timing = {"ts": start_us, "dur": round(end_us - start_us, 3)}
            rows.append({"ph": "X", "name": span.name, **place, **timing, "args": span.details})
    return rows


def _of(trace: Trace, track: Track) -> list[TraceSpan]:
    return [span for span in trace.spans if span.track == track]


def _side_by_side(spans: Sequence[TraceSpan]) -> list[list[TraceSpan]]:
    """The fewest lanes in which no two spans overlap; at least one lane."""
    found: list[list[TraceSpan]] = [[]]
    for span in sorted(spans, key=lambda span: span.start_s):
        free = next((lane for lane in found if not lane or lane[-1].end_s <= span.start_s), None)
        if free is None:
            found.append([span])
        else:
            free.append(span)
    return found


def _merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union, as disjoint intervals in order."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((start, end))
    return union


def _without(kept: Sequence[Interval], removed: Sequence[Interval]) -> list[Interval]:
    """What of ``kept`` lies outside of ``removed``; both disjoint and in order."""
    left: list[Interval] = []
    first = 0
    for start, end in kept:
        while first < len(removed) and removed[first][1] <= start:
            first += 1
        at = first
        while at < len(removed) and removed[at][0] < end:
            other_start, other_end = removed[at]
            if other_start > start:
                left.append((start, other_start))
            start = max(start, other_end)
            at += 1
        if start < end:
            left.append((start, end))
    return left


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)
