"""``bench serve``: its figures belong together, and what they are of has really been computed. No time is judged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.bench.results import TINY, is_picture
from tests.commands import Result
from tsqp.api.config import ComputeConfig, RunConfig
from tsqp.bench import serve
from tsqp.bench.modes import in_mode
from tsqp.bench.opened import opened
from tsqp.bench.pads import pads_of
from tsqp.bench.plot import draw
from tsqp.bench.serve import Traffic, bench_serve
from tsqp.bench.show import chart, table
from tsqp.errors import OptionError
from tsqp.trusted.engine.engine import Engine

QUICK = Traffic(streams=3, tokens=5, steps=4, beside=2, long=40, turn=30, runs=2)
RUN = RunConfig(TINY, "open", compute=ComputeConfig(threads=1))


@pytest.mark.slow
def test_each_figure_follows_from_the_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[list[int], int]] = []

    def peer(prompts: list[list[int]], steps: int) -> float:
        asked.append(([len(prompt) for prompt in prompts], steps))
        return 7.0 * len(prompts)

    monkeypatch.setattr(serve, "_peers", lambda *_: {"a peer": peer})
    result = bench_serve(RUN, QUICK, Console(quiet=True))
    assert list(result["rates"]) == ["open", "masked", "a peer"]
    assert asked == [([5], 4), ([5, 5, 5], 4)] * 3
    for row in result["rates"].values():
        assert {count: len(rates) for count, rates in row["all"].items()} == {"1": 2, "3": 2}
        assert row["ratio"] * row["one"] == pytest.approx(row["many"])
    assert result["rates"]["a peer"]["ratio"] == 3
    for figure, first, second in (("gaps", "gap_alone_s", "gap_beside_s"), ("turns", "first_turn_s", "second_turn_s")):
        for mode in ("open", "masked"):
            row = result[figure][mode]
            assert row["ratio"] * row[first] == pytest.approx(row[second])
            assert all(len(seconds) == 2 for seconds in row["all"].values())
    console = Console(record=True, width=140)
    console.print(table(result))
    assert "a peer, 1 and 3" in console.export_text()
    draw(chart(result), tmp_path / "serve.png")
    assert is_picture(tmp_path / "serve.png")


@pytest.mark.slow
def test_one_mode_alone_by_the_command(tsqp: Callable[..., Result], tmp_path: Path) -> None:
    run = ("bench", "serve", "-m", TINY, "--mode", "open", "--no-http", "--threads", 1, "--runs", 1, "--json")
    done = tsqp(*run, "--results", tmp_path, "--dirty-ok", "--streams", 2, "--steps", 3, "--long", 40, "--turn", 30)
    assert done.code == 0, done.err
    assert list(done.json["rates"]) == list(done.json["gaps"]) == ["open"]
    assert done.json["server"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["serve-tiny-open.json"]  # the file of both modes stays


class Clock:
    """The tokens that an engine has given, in the place of the time. Every look at it takes a second."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.given: list[int] = []

    def perf_counter(self) -> float:
        self.given.append(self._engine.counts().new_tokens)
        return float(len(self.given))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [5, 1500])
def test_a_rate_is_of_the_tokens_that_came_while_all_streams_went_on(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long prompts take several steps, after which some streams have their first tokens and others have none."""
    with opened(in_mode(RUN, "open"), Console(quiet=True)) as llm:
        clock = Clock(llm.engine)
        monkeypatch.setattr(serve, "time", clock)
        rate = serve._ours(llm)(serve._prompts(3, tokens), 4)
        begun, ended = clock.given
        assert rate == ended - begun == 3 * 4
        assert not llm.engine.has_work()


@pytest.mark.parametrize(
    "wrong",
    [{"streams": 1}, {"streams": 65}, {"beside": 64}, {"steps": 0}, {"long": 0}, {"runs": 0}],
    ids=lambda wrong: str(wrong),
)
def test_traffic_that_is_none_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"--{next(iter(wrong))}"):
        bench_serve(RUN, Traffic(**wrong), Console(quiet=True))


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(OptionError, match="unknown mode 'local'"):
        bench_serve(RUN, QUICK, Console(quiet=True), "local")


def test_of_100_gaps_95_are_no_longer() -> None:
    assert serve._later([float(n) for n in range(100, 0, -1)]) == 95.0
    assert serve._later([3.0]) == 3.0


@pytest.mark.slow
def test_pads_are_ready_for_what_is_measured_and_none_are_made_meanwhile() -> None:
    with opened(in_mode(RUN, "masked"), Console(quiet=True)) as llm:
        pool, filler = pads_of(llm)
        serve._ours(llm)(serve._prompts(3, 5), 4)
        serve._gaps(llm, QUICK)
        serve._turns(llm, QUICK)
        assert pool.missed == 0 < pool.used
        assert not filler.make_some()  # what runs next has the cores to itself
