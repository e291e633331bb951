"""``--trace`` and the share of communication."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.commands import Result
from tests.conftest import StartWorker
from tsqp import LLM, ComputeConfig, SamplingParams
from tsqp.api.trace_file import _without, communication_share, events, lanes, worker_spans
from tsqp.trusted.trace import Trace

TINY = "synthetic:tiny"


def call(trace: Trace, number: int, start: float, sent: float, arrived: float, busy: float) -> None:
    """One call as a session records it, taken in at once."""
    trace.add("line", "send", start, sent, id=number)
    trace.add("line", "wait", sent, arrived)
    trace.add("call", "qkv", start, arrived, id=number, busy_s=busy)


def test_the_share_is_what_neither_side_computes() -> None:
    trace = Trace()
    trace.add("operator", "rms_norm", 0.0, 2.0)
    call(trace, 1, 2.0, 2.5, 8.0, busy=4.0)
    trace.add("operator", "silu", 8.0, 9.0)
    trace.add("pass", "prefill", 0.0, 10.0)  # the last second is the trusted side's too: no operator, no call
    assert communication_share(trace) == pytest.approx(1 - (4.0 + 4.0) / 10.0)
    assert communication_share(trace, "prefill") == pytest.approx(0.2)
    assert communication_share(trace, "decode") is None


def test_time_in_which_both_sides_compute_counts_once() -> None:
    trace = Trace()
    trace.add("line", "send", 0.0, 0.0, id=1)
    trace.add("line", "send", 0.0, 0.0, id=2)
    trace.add("operator", "silu", 0.0, 4.0)
    trace.add("line", "wait", 4.0, 8.0)
    trace.add("call", "o", 0.0, 8.0, id=1, busy_s=3.0)
    trace.add("call", "o", 0.0, 8.0, id=2, busy_s=3.0)
    trace.add("pass", "prefill", 0.0, 8.0)
    assert [(span.start_s, span.end_s) for span in worker_spans(trace)] == [(0.0, 3.0), (3.0, 6.0)]
    assert communication_share(trace) == pytest.approx(2.0 / 8.0)
    assert [len(lane.spans) for lane in lanes(trace) if lane.title.startswith("calls")] == [1, 1]


def test_a_lie_about_the_workers_time_stays_within_its_call() -> None:
    trace = Trace()
    call(trace, 1, 1.0, 1.0, 2.0, busy=1e9)
    call(trace, 2, 2.0, 2.0, 3.0, busy=0.5)
    trace.add("pass", "decode", 0.0, 3.0)
    assert [(span.start_s, span.end_s) for span in worker_spans(trace)] == [(1.0, 2.0), (2.0, 2.5)]
    assert communication_share(trace) == pytest.approx(0.5 / 3.0)


def test_stages_of_a_device_have_lanes_of_their_own_and_end_with_the_call() -> None:
    trace = Trace()
    stages = (0, 1_000_000_000), (1_000_000_000, 4_000_000_000), (4_000_000_000, 5_000_000_000)
    for number in range(2):
        trace.add("call", "qkv", number * 3.0, 6.0 + number * 3.0, id=number, busy_s=3.0, stages_ns=stages)
    trace.add("line", "wait", 0.0, 9.0)
    trace.add("pass", "prefill", 0.0, 10.0)
    drawn = {
        lane.title: [(span.start_s, span.end_s) for span in lane.spans]
        for lane in lanes(trace)
        if lane.title.endswith("as it says")
    }
    assert drawn == {
        "copying in, as it says": [(1.0, 2.0), (4.0, 5.0)],
        "computing, as it says": [(2.0, 5.0), (5.0, 8.0)],
        "copying out, as it says": [(5.0, 6.0), (8.0, 9.0)],
    }
    assert communication_share(trace) == pytest.approx((9.0 - 6.0) / 10.0), "copies are communication"


@pytest.mark.parametrize(
    "stages",
    [((0, 1 << 61),) * 3, ((5, 0), (1 << 61, 7), (0, 0)), ((0, 0), (0, 0), (0, 0))],
    ids=["longer than the call", "ends before it begins", "nothing"],
)
def test_a_lie_about_stages_stays_within_its_call(stages: tuple[tuple[int, int], ...]) -> None:
    trace = Trace()
    trace.add("call", "o", 1.0, 2.0, id=1, busy_s=0.5, stages_ns=stages)
    found = [span for lane in lanes(trace) if lane.title.endswith("as it says") for span in lane.spans]
    assert len(found) == 3
    assert all(1.0 <= span.start_s <= span.end_s <= 2.0 for span in found)


@given(*2 * [st.lists(st.integers(0, 60), unique=True, max_size=24)])
def test_what_is_left_of_intervals_is_what_no_other_covers(kept: list[int], removed: list[int]) -> None:
    def disjoint(edges: list[int]) -> list[tuple[float, float]]:
        ordered = sorted(edges)
        return list(zip(ordered[::2], ordered[1::2], strict=False))

    def covered(intervals: Sequence[tuple[float, float]]) -> set[int]:
        return {unit for start, end in intervals for unit in range(int(start), int(end))}

    one, other = disjoint(kept), disjoint(removed)
    left = _without(one, other)
    assert covered(left) == covered(one) - covered(other)
    assert all(start < end for start, end in left)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(left))


def test_a_trace_with_nothing_in_it() -> None:
    assert communication_share(Trace()) is None
    assert all(event["ph"] == "M" for event in events(Trace()))


@pytest.mark.parametrize("partition", ["linear", "op"])
def test_generate_writes_a_trace(
    partition: str, tmp_path: Path, tsqp: Callable[..., Result], start_worker: StartWorker
) -> None:
    path = tmp_path / "trace.json"
    run: tuple[str, ...] = ("-m", TINY, "--protection", "open", "--dtype", "float32", "--partition", partition)
    run += ("--worker", start_worker(TINY))
    result = tsqp("generate", "abc", *run, "--max-tokens", 3, "--stats", "--trace", path, "--json")
    assert "communication:" in result.err
    by_lane = read_lanes(path)
    titles = {title for title in by_lane if not title.startswith("calls under way")}
    assert titles == {"forward passes", "operators", "send, wait, take in", "computing, as it says"}
    assert [event["name"] for event in by_lane["forward passes"]] == ["prefill", "decode", "decode"]
    calls = [event for title, lane in by_lane.items() if title.startswith("calls") for event in lane]
    assert len(calls) == result.json["stats"]["rpc_calls"]
    assert any(event["name"] == "qkv" for event in calls)
    worker_us = sum(event["dur"] for event in by_lane["computing, as it says"])
    assert 0 < worker_us <= sum(event["dur"] for event in by_lane["forward passes"])


def read_lanes(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The complete events of a trace file by lane; fails where two of one lane overlap."""
    rows = json.loads(path.read_text())["traceEvents"]
    names = {(row["pid"], row["tid"]): row["args"]["name"] for row in rows if row["name"] == "thread_name"}
    by_lane = defaultdict(list)
    for row in rows:
        if row["ph"] == "X":
            assert row["ts"] >= 0
            assert row["dur"] >= 0
            by_lane[names[row["pid"], row["tid"]]].append(row)
    for title, lane in by_lane.items():
        for before, after in itertools.pairwise(lane):
            assert before["ts"] + before["dur"] <= after["ts"] + 0.002, title  # times are rounded to nanoseconds
    return dict(by_lane)


def test_without_a_trace_nothing_is_recorded(start_worker: StartWorker) -> None:
    with LLM(TINY, protection="open", worker=start_worker(TINY), compute=ComputeConfig(dtype="float32")) as llm:
        llm.generate([1, 2, 3], SamplingParams(max_tokens=2))
        assert llm.stats.trace is None
        trace = llm.stats.trace = Trace()
        llm.stats.reset()
        assert llm.stats.trace is trace
        llm.generate([1, 2, 3], SamplingParams(max_tokens=2))
        assert sum(span.track == "pass" for span in trace.spans) == 2
        assert sum(row.worker_s for row in llm.stats.calls.values()) > 0


def test_a_trace_that_cannot_be_written_is_refused_first(tsqp: Callable[..., Result]) -> None:
    result = tsqp("generate", "abc", "-m", TINY, "--trace", "/no/such/directory/trace.json")
    assert result.code == 2
    assert "--trace" in result.error
