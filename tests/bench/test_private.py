"""The benchmarks of the private modes run and say what they must. Nothing here judges a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from tests.bench.results import QUICK, TINY, is_measured, is_picture
from tests.commands import Result
from tests.conftest import StartWorker
from tsqp import LLM, ComputeConfig, GuardConfig
from tsqp.api.config import RunConfig
from tsqp.api.pads import pool_bytes
from tsqp.bench.opened import opened
from tsqp.bench.pads import PadsDrained, PadsReady, drain, fill, pads_of, with_pads
from tsqp.bench.private import MODES
from tsqp.checkpoint import open_checkpoint
from tsqp.errors import OptionError

pytestmark = pytest.mark.slow  # two minutes in all: each opens models, and measures them

Command = Callable[..., Result]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_masked_is_measured_with_pads_and_without(phase: str, tsqp: Command, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    steps = ("--steps", 2) if phase == "decode" else ()
    run = ("bench", phase, "-m", TINY, "--protection", "masked", "--tokens", 20, *steps, "--peer", "ours")
    done = tsqp(*run, *QUICK, "--plot", plot)
    assert done.code == 0, done.err
    result = done.json
    assert (result["protection"], result["dtype"], result["wire_dtype"]) == ("masked", "field", "uint32")
    assert result["seconds"] > 0
    assert result["seconds_drained"] > 0
    assert result["ratio_drained"] == pytest.approx(result["seconds_drained"] / result["peer"]["seconds"])
    assert len(result["all_seconds"]["drained"]) == result["runs"] == 1
    assert result["peer"]["name"] == "TSQP linear, bfloat16"
    assert result["pads"]["source"] == "tee"
    assert result["pads"]["ahead"] >= 20
    assert "pads drained" in done.err
    assert is_measured(result)
    assert is_picture(plot)


def test_verified_has_nothing_to_drain(tsqp: Command) -> None:
    result = tsqp(
        "bench", "prefill", "-m", TINY, "--protection", "verified", "--peer", "none", "--tokens", 5, *QUICK
    ).json
    assert "seconds_drained" not in result
    assert "pads" not in result
    assert (result["protection"], result["wire_dtype"]) == ("verified", "int16")


def test_open_is_the_default_of_a_benchmark(tsqp: Command) -> None:
    done = tsqp("bench", "prefill", "-m", TINY, "--peer", "none", "--tokens", 5, *QUICK)
    assert (done.json["protection"], done.json["dtype"]) == ("open", "bfloat16")
    assert "warning: protection open" in done.err
    assert tsqp("bench", "prefill", "-m", TINY, "--checks", 3, *QUICK).code == 2


def test_pads_of_a_dealer_that_runs_already(tsqp: Command, start_worker: StartWorker) -> None:
    dealer = ("--pad-source", f"dealer={start_worker(TINY, 'ipc', dtype='field')}", "--dealer-no-separation")
    run = ("bench", "prefill", "-m", TINY, "--protection", "masked", "--tokens", 5, "--peer", "none")
    done = tsqp(*run, *dealer, *QUICK)
    assert done.code == 0, done.err
    assert done.json["pads"]["source"] == "dealer"
    assert done.json["seconds_drained"] > 0
    assert "no separation" in done.err


@pytest.mark.slow
def test_private_compares_every_mode_with_open(tsqp: Command, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    run = ("bench", "private", "-m", TINY, "--tokens", 20, "--steps", 2, "--results", tmp_path)
    done = tsqp(*run, *QUICK, "--plot", plot)
    assert done.code == 0, done.err
    result = done.json
    assert result["micro_batches"] is None
    assert result["modes"].keys() == MODES.keys()
    for row in result["modes"].values():
        for phase in ("prefill", "decode"):
            peer = result["modes"]["open"][f"{phase}_s"]
            assert row[f"{phase}_ratio"] == pytest.approx(row[f"{phase}_s"] / peer)
            assert len(row[f"all_{phase}_s"]) == 1
        assert row["name"] in done.err
    assert result["modes"]["open"]["prefill_ratio"] == 1
    assert result["seconds"] == result["modes"]["masked"]["prefill_s"]
    assert result["seconds_drained"] == result["modes"]["masked_drained"]["prefill_s"]
    assert result["ratio"] == result["modes"]["masked"]["prefill_ratio"]
    assert result["pads"]["ahead"] >= 22
    assert is_measured(result)
    assert is_picture(plot)
    assert json.loads((tmp_path / "private-tiny.json").read_text()) == result


def test_every_mode_has_the_micro_batches_that_were_asked_for(tsqp: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def opens(run: RunConfig, console: Console) -> LLM:
        asked[run.protection] = run.compute.micro_batches
        return opened(run, console)

    monkeypatch.setattr("tsqp.bench.private.opened", opens)
    run = ("bench", "private", "-m", TINY, "--mode", "masked", "--tokens", 4, "--steps", 1, "--micro-batches", 2)
    assert tsqp(*run, *QUICK).json["micro_batches"] == 2
    assert asked == {"open": 2, "masked": 2}


def test_guard_counts_each_part(tsqp: Command, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    run = ("bench", "guard", "-m", TINY, "--tokens", 20, "--results", tmp_path, "--plot", plot)
    done = tsqp(*run, *QUICK)
    assert done.code == 0, done.err
    result, config = done.json, open_checkpoint(TINY).config
    assert result["mask_s"] > 0
    assert result["seconds"] == result["with_expansion_s"] > 0
    dots = result["check_dots_s"]
    assert dots.keys() == {"qkv", "o", "gate_up", "down", "lm_head"}
    layers = config.num_layers * sum(seconds for name, seconds in dots.items() if name != "lm_head")
    assert result["check_dots_s_per_prefill"] == pytest.approx(layers + dots["lm_head"])
    share = result["check_dots_s_per_prefill"] / result["masked_prefill_s"]
    assert result["check_share_of_prefill"] == pytest.approx(share)
    assert result["field_product"].keys() == {"rows_1", "rows_20"}
    for product in result["field_product"].values():
        assert product["ratio"] == pytest.approx(product["field_s"] / product["bfloat16_s"])
    sizes = result["pad_row_bytes"]
    assert sizes["decode"] - sizes["prefill"] == 4 * config.vocab_size
    assert is_measured(result)
    assert is_picture(plot)
    assert json.loads((tmp_path / "guard-tiny.json").read_text()) == result


def test_a_pads_row_at_the_1b_shape_is_as_large_as_the_design_says() -> None:
    from tsqp.api.pads import row_bytes
    from tsqp.checkpoint.synthetic import SHAPES

    config = SHAPES["llama-3.2-1b"]
    assert row_bytes(config, answer=False) == pytest.approx(1.5e6, rel=0.01)
    assert row_bytes(config, answer=True) == pytest.approx(2.0e6, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("private", "--tokens", 0), "--tokens"),
        (("guard", "--runs", 0), "--runs"),
        (("private", "--results", "/no/such/directory"), "--results"),
        (("guard", "--results", "/no/such/directory"), "--results"),
    ],
)
def test_bad_options_are_one_line(arguments: tuple[object, ...], words: str, tsqp: Command) -> None:
    result = tsqp("bench", *arguments)
    assert result.code == 2
    assert words in result.error


def test_a_run_finds_its_pads_and_the_other_finds_none(start_worker: StartWorker) -> None:
    worker, prompt = start_worker(TINY, dtype="field"), list(range(20))
    guard = with_pads(RunConfig(TINY), 24).guard
    with LLM(TINY, protection="masked", worker=worker, guard=guard) as llm:
        pool, filler = pads_of(llm)
        blocks = filler.blocks
        PadsReady(llm).run(prompt, 3)
        assert pool.missed == 0
        fill(pool, filler)
        assert filler.ready(answer=True) >= 24
        filler.blocks = {}  # its thread makes none from here on, however long this one has no processor
        drain(pool)
        assert filler.ready(answer=True) == 0
        filler.blocks = blocks
        fill(pool, filler)
        filler.blocks, before = {}, pool.missed
        PadsDrained(llm).run(prompt, 3)
        assert pool.missed - before >= len(prompt) * (len(pool.keys) - 1)  # of each layer, at least


def test_room_for_pads_is_made_for_masked_alone() -> None:
    roomy = with_pads(RunConfig(TINY, guard=GuardConfig(pad_memory=1)), 1000).guard
    assert roomy.pads_ahead == 1000
    assert roomy.pad_memory == pool_bytes(open_checkpoint(TINY).config, 1000)
    assert with_pads(RunConfig(TINY, "verified"), 1000) == RunConfig(TINY, "verified")
    with (
        LLM(TINY, protection="local", compute=ComputeConfig(dtype="float32")) as llm,
        pytest.raises(OptionError, match="no pads"),
    ):
        pads_of(llm)
