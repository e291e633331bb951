"""``bench load``: what is asked is bounded and belongs together, and real servers answer it. No time is judged."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.bench.results import TINY, is_picture
from tests.commands import Result
from tests.families import tiny_model
from tsqp.api.config import ComputeConfig, RunConfig
from tsqp.api.pads import pool_bytes
from tsqp.bench import load_targets, serve
from tsqp.bench.load import bench_load
from tsqp.bench.load_setup import Load, server_options
from tsqp.bench.plot import draw
from tsqp.bench.show import chart, table
from tsqp.checkpoint import open_checkpoint
from tsqp.errors import OptionError

RUN = RunConfig(TINY, "open", compute=ComputeConfig(threads=1))
QUICK = Load(streams=(1, 2), shares=(0.5,), tokens=5, steps=4, seconds=0.2, pads=64, runs=1)


class Batches:
    """A peer that takes no time."""

    name = "a peer"

    def at_once(self, streams: int, _: Any) -> dict[str, Any]:
        spread = {"p50_s": 1.0, "p95_s": 2.0}
        figures = {"answers": streams, "refused": 0, "seconds": 1.0, "tokens_per_s": 5.0 * streams}
        return {**figures, "first": spread, "token": spread, "whole": spread}


def shown(result: dict[str, Any]) -> str:
    console = Console(record=True, width=160)
    console.print(table(result))
    return console.export_text()


@pytest.mark.slow
def test_servers_in_both_modes_beside_a_peer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(load_targets, "peers", lambda *_: [Batches()])
    result = bench_load(RUN, QUICK, Console(quiet=True))
    assert list(result["http"]) == list(result["arrivals"]) == ["open", "masked"]
    assert list(result["sweep"]) == ["open", "masked", "a peer"]
    for row in result["http"].values():
        assert row["ratio"] * row["library_s"] == pytest.approx(row["http_s"])
        assert {side: len(times) for side, times in row["all"].items()} == {"library": 1, "http": 1}
    for mode in ("open", "masked"):
        assert [point["streams"] for point in result["sweep"][mode]] == [1, 2]
        best = max(point["tokens_per_s"] for point in result["sweep"][mode])
        (chance,) = result["arrivals"][mode]
        assert chance["asked_per_s"] * QUICK.count == pytest.approx(0.5 * best)
        for point in (*result["sweep"][mode], chance):
            assert point["refused"] == 0
            assert point["answers"] >= point.get("streams", 1)
            assert 0 < point["first"]["p50_s"] <= point["first"]["p95_s"]
            assert point["first"]["p50_s"] <= point["whole"]["p50_s"]
    # Of no answer were pads made on the spot, which is what "pads ready" means.
    assert result["made_pads"]["masked"]["missed"] == 0 < result["made_pads"]["masked"]["used"]
    text = shown(result)
    for words in ("masked, 2 ", "a peer, 1 ", "/s, 0.5 ", "HTTP / library", "pads ready"):
        assert words in text
    draw(chart(result), tmp_path / "load.png")
    assert is_picture(tmp_path / "load.png")


def test_peers_that_cannot_have_the_model_are_left_out_and_it_is_said() -> None:
    """Of a model that peers do not implement, ours can still be measured."""
    run = RunConfig(str(tiny_model("gemma2").directory), "open", compute=ComputeConfig(threads=1))
    console = Console(file=(said := io.StringIO()))
    with ExitStack() as stack:
        assert list(load_targets.peers(run, QUICK, stack, console)) == []
        assert serve._peers(run, serve.Traffic(), stack, console) == {}
    lines = [line for line in said.getvalue().splitlines() if line.startswith("without")]
    assert len(lines) == 6
    for words in ("transformers: writing", "llama.cpp BF16: --peer llama.cpp", "llama.cpp Q8_0: --peer llama.cpp"):
        assert sum(line.startswith(f"without {words}") for line in lines) == 2


@pytest.mark.slow
def test_one_mode_alone_by_the_command(tsqp: Callable[..., Result], tmp_path: Path) -> None:
    run = ("bench", "load", "-m", TINY, "--mode", "open", "--threads", 1, "--runs", 1, "--json", "--seconds", 0.2)
    kept = ("--results", tmp_path, "--dirty-ok")
    done = tsqp(*run, *kept, "--streams", 1, "--streams", 3, "--share", 0.5, "--tokens", 5, "--steps", 4)
    assert done.code == 0, done.err
    assert (done.json["benchmark"], done.json["streams"], done.json["shares"]) == ("load", [1, 3], [0.5])
    assert list(done.json["sweep"]) == ["open"]
    assert done.json["made_pads"] == {}
    assert [path.name for path in tmp_path.iterdir()] == ["load-tiny-open.json"]  # the file of both modes stays


def refused() -> dict[str, Any]:
    """A result in which a server has refused everybody who came by chance."""
    none = {"answers": 0, "refused": 7, "seconds": 1.0, "tokens_per_s": 0.0, "first": None, "token": None}
    return {
        "benchmark": "load",
        "model": "m",
        "tokens": 5,
        "steps": 4,
        "http": {"open": {"library_s": 0.010, "http_s": 0.0105, "ratio": 1.05}},
        "sweep": {"open": [{"streams": 1, **Batches().at_once(1, None)}]},
        "arrivals": {"open": [{"share": 2.0, "asked_per_s": 4.0, **none}]},
        "made_pads": {},
        "machine": {"cpu": "a processor"},
    }


def test_refusals_and_points_without_an_answer_are_shown(tmp_path: Path) -> None:
    result = refused()
    text = shown(result)
    assert "1.050" in text
    (row,) = [line.split() for line in text.splitlines() if "/s, 2 " in line]
    assert row[-2:] == ["0", "7"]
    draw(chart(result), tmp_path / "load.png")
    assert is_picture(tmp_path / "load.png")


def test_bench_serve_shows_its_own_figures_and_those_of_the_server(tmp_path: Path) -> None:
    rates = {"open": {"one": 11.25, "many": 45.0, "ratio": 4.0, "all": {"1": [11.25], "16": [45.0]}}}
    own = {"streams": 16, "beside": 4, "long": 8, "turn": 8, "rates": rates, "gaps": {}, "turns": {}}
    result = {**refused(), "benchmark": "serve", **own, "server": refused()}
    text = shown(result)
    assert "11.25" in text
    assert "1.050" in text
    assert len(chart(result).panels) == len(chart({**result, "server": None}).panels) + 2
    assert "1.050" not in shown({**result, "server": None})
    draw(chart(result), tmp_path / "serve.png")
    assert is_picture(tmp_path / "serve.png")


@pytest.mark.parametrize(
    ("wrong", "option"),
    [
        ({"streams": ()}, "--streams"),
        ({"streams": (1, 0)}, "--streams"),
        ({"streams": (65,)}, "--streams"),
        ({"shares": (0.0,)}, "--share"),
        ({"shares": (float("nan"),)}, "--share"),
        ({"tokens": 0}, "--tokens"),
        ({"steps": 0}, "--steps"),
        ({"runs": 0}, "--runs"),
        ({"seconds": 0.0}, "--seconds"),
        ({"seconds": float("inf")}, "--seconds"),
        ({"streams": (1, 16), "tokens": 10, "steps": 9, "pads": 319}, "--pads must be at least 320"),
        ({"streams": (1,), "tokens": 10, "steps": 9, "pads": 29}, "--pads must be at least 30"),
    ],
)
def test_a_load_that_cannot_be_is_refused(wrong: dict[str, Any], option: str) -> None:
    with pytest.raises(OptionError, match=option):
        bench_load(RUN, Load(**wrong), Console(quiet=True))


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(OptionError, match="unknown mode 'local'"):
        bench_load(RUN, QUICK, Console(quiet=True), "local")


def test_without_a_client_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"tsqp\[bench\]"):
        bench_load(RUN, QUICK, Console(quiet=True))


def test_as_many_answers_as_pads_and_no_more() -> None:
    assert Load(tokens=10, steps=9, pads=399).answers_with_pads == 19
    assert Load(tokens=10, steps=9, pads=400).answers_with_pads == 20


def test_a_masked_server_has_room_for_all_pads_and_refuses_to_make_missing_ones() -> None:
    options = server_options(RUN, "masked", QUICK)
    assert options[options.index("--pads-empty") + 1] == "refuse"
    assert options[options.index("--pads-ahead") + 1] == "64"
    assert options[options.index("--kv-dtype") + 1] == "bfloat16"
    assert "--dtype" not in options
    room = int(options[options.index("--pad-memory") + 1])
    assert room == pool_bytes(open_checkpoint(TINY).config, 64, whole_answers=True)


def test_an_open_server_computes_in_what_the_library_beside_it_does() -> None:
    options = server_options(RUN, "open", QUICK)
    assert options[options.index("--dtype") + 1] == "bfloat16"
    assert options[options.index("--threads") + 1] == "1"
    assert "--pads-ahead" not in options
