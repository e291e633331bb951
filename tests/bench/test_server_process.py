"""The server that a benchmark starts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from tests.bench.results import TINY
from tests.commands import LIMIT_S
from tsqp.bench import server_process
from tsqp.bench.server_process import ServerProcess, wait_for_pads
from tsqp.errors import WorkerUnreachable


def test_one_that_does_not_start_is_an_error() -> None:
    with pytest.raises(WorkerUnreachable, match="did not start"):
        ServerProcess("--port", "-1")


def test_one_ends_when_its_standard_input_does() -> None:
    """Which is what the end of a benchmark is, however it ends."""
    with ServerProcess("--model", TINY, "--protection", "local") as server:
        process = server._process
        assert process.poll() is None
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(LIMIT_S) == 0


def pads(*ready: float) -> Callable[[], dict[str, float]]:
    """Metrics of a server that has so many pads each time that it is asked, of 32."""
    looks = iter(ready)
    return lambda: {"tsqp:pads_ready": next(looks), "tsqp:pads_ahead": 32.0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock says, from the next time on that it is asked. Nothing sleeps."""
    times: list[float] = []
    fake = SimpleNamespace(perf_counter=lambda: times.pop(0), sleep=lambda _: None)
    monkeypatch.setattr(server_process, "time", fake)
    return times


def test_pads_are_waited_for_and_those_made_meanwhile_counted(clock: list[float]) -> None:
    clock += [0.0, 1.0, 2.0, 5.0]
    told: list[tuple[float, float]] = []
    made = wait_for_pads(pads(8.0, 20.0, 33.0), lambda *figures: told.append(figures))
    assert made == (25.0, 5.0)
    assert told == [(8.0, 32.0), (20.0, 32.0)]


def test_pads_that_are_not_made_end_the_measurement(clock: list[float]) -> None:
    clock += [0.0, 1.0, server_process.LIMIT_S + 1]
    with pytest.raises(WorkerUnreachable, match="8 of 32 pads"):
        wait_for_pads(pads(8.0, 8.0), lambda *_: None)
