"""What an audit prints, and the attack as the regression test of the private modes."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from tests.adapters import write_adapter
from tests.commands import Result
from tests.families import tiny_model
from tsqp.audit.report import LEGEND, Exposure, ModeReport, Recovery, print_report
from tsqp.cli.audit import MODES, capture_run, run_audit
from tsqp.wire.messages import Product, ToWorker

FIELDS = {"protection", "attack", "recovered_fraction", "recovered_text", "uniformity_p", "bytes_seen"}
SECRET = "My patient John Q. Public, born 1961-04-12, was diagnosed with lymphoma; write to his insurer."
TOKENS = 31  # of SECRET in the default model


@pytest.fixture
def directory() -> str:
    return str(tiny_model("llama").directory)


@pytest.mark.slow
def test_every_mode_in_one_object(tsqp: Callable[..., Result], directory: str) -> None:
    result = tsqp("audit", "attack at dawn", "--model", directory, "--threads", 1, "--json")
    assert result.code == 0, result.err
    in_open, verified, masked = modes = result.json["modes"]
    assert [mode["protection"] for mode in modes] == list(MODES)
    assert all(mode.keys() >= FIELDS for mode in modes)
    for in_clear in (in_open, verified):
        assert in_clear["recovered_text"] == "attack at dawn"
        assert in_clear["recovered_fraction"] == 1.0
        assert in_clear["deeper"][0]["recovered_fraction"] > 0.9  # the first token has no context to be listed by
        assert in_clear["uniformity_p"] < 1e-9
        assert in_clear["dealer"] is None
    # Of noise a guess is right 0.0032 of the time, as for one token of 320 (measured, 40,000 rows). Of 14 guesses four
    # are right with C(14, 4) · 0.0032⁴ = 1.0e-7; of four attacks one has so many with 4.2e-7. In clear 13 are, or 14.
    chance = 3 / len("attack at dawn")
    attacks = (masked, *masked["deeper"], *masked["dealer"]["recoveries"])
    assert len(attacks) == 4
    for attack in attacks:
        assert attack["recovered_fraction"] <= attack["noise_fraction"] + chance
    assert masked["uniformity_p"] > 1e-6
    assert masked["dealer"]["uniformity_p"] > 1e-6
    assert masked["dealer"]["bytes_seen"] >= 32 * masked["dealer"]["keys"] > 0


def test_one_mode_is_flat_and_says_nothing_of_the_prompt_elsewhere(tsqp: Callable[..., Result], directory: str) -> None:
    result = tsqp("audit", "attack at dawn", "--model", directory, "--threads", 1, "--protection", "open", "--json")
    assert result.json["protection"] == "open"
    assert "attack at dawn" not in result.err


@pytest.mark.slow
def test_an_adapter_shows_in_nothing_that_is_sent(directory: str, tmp_path: Path) -> None:
    """Call by call the same groups, rows and bytes; one of the two answers may end earlier."""
    adapter = write_adapter(tmp_path / "books", tiny_model("llama"))
    sent = []
    for lora in (None, f"a={adapter}"):
        captured = capture_run((1, 2), "masked", model=directory, device="cpu", dtype="auto", threads=1, lora=lora)
        calls = [seen for seen in captured.worker.messages if isinstance(seen.message, Product)]
        sent.append([(told(seen.message), [len(part) for part in seen.payloads or ()]) for seen in calls])
    assert min(map(len, sent)) >= 9  # one pass of two layers
    assert all(one == other for one, other in zip(*sent, strict=False))


def told(call: ToWorker) -> dict[str, object]:
    """All of a call but its number."""
    return {name: value for name, value in msgspec.structs.asdict(call).items() if name != "id"}


def test_the_adapter_of_an_audit_answers(tsqp: Callable[..., Result], directory: str, tmp_path: Path) -> None:
    """In clear the second layer's input differs by what the adapter adds, and an attack knows the model without it."""
    adapter = write_adapter(tmp_path / "books", tiny_model("llama"), alpha=400.0)
    run = ("audit", "attack at dawn", "--model", directory, "--threads", 1, "--protection", "open", "--json")
    found = tsqp(*run, "--lora", adapter).json
    assert found["recovered_fraction"] == 1  # the first layer's is the same
    assert found["deeper"][0]["recovered_fraction"] < 0.9


def test_options_that_would_play_no_part_are_refused(tsqp: Callable[..., Result]) -> None:
    result = tsqp("audit", "x", "--protection", "masked", "--dtype", "bfloat16")
    assert (result.code, "leave out --dtype" in result.error) == (2, True)


def test_a_long_prompt_is_refused_before_anything_starts(tsqp: Callable[..., Result], directory: str) -> None:
    result = tsqp("audit", "y" * 201, "--model", directory)
    assert (result.code, "at most 200" in result.error) == (2, True)
    assert "running" not in result.err


def test_recovered_text_is_no_markup_and_no_terminal_sequence() -> None:
    recovery = Recovery("vocabulary match", 0, 1.0, "[bold]x[/bold]\x1b[2J", 0.0)
    console = Console(file=io.StringIO(), width=100)
    print_report([ModeReport("open", Exposure(1_000, 2, 0, 0.0, (recovery,)))], console)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert "[bold]x[/bold]?[2J" in printed
    assert "\x1b" not in printed
    assert "1,000 bytes in 2 calls; uniformity p = 0" in printed
    assert printed.splitlines()[-len(LEGEND) :] == list(LEGEND)


@pytest.mark.parametrize(
    ("given", "flags", "warns"),
    [
        (["hello"], [], True),
        (["hello"], ["--protection", "masked"], True),
        (["hello"], ["--protection", "open"], False),
        (["-"], [], False),
        (["--prompt-file", "-"], [], False),
        (["--prompt-file", "FILE"], [], False),
    ],
)
def test_the_prompt_comes_from_where_the_user_says(
    tsqp: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    given: list[str],
    flags: list[str],
    warns: bool,
) -> None:
    audited: list[tuple[str, object]] = []

    def run_nothing(text: str, modes: tuple[str, ...], **_: object) -> list[ModeReport]:
        audited.append((text, modes))
        return []

    (tmp_path / "prompt").write_text("hello\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
    monkeypatch.setattr("tsqp.cli.audit.run_audit", run_nothing)
    monkeypatch.setitem(os.environ, "TSQP_PROTECTION", "local")  # plays no part
    result = tsqp("audit", *(word.replace("FILE", str(tmp_path / "prompt")) for word in given), *flags)
    assert result.code == 0, result.err
    assert audited == [("hello", tuple(flags[1:]) or MODES)]
    assert ("use - or --prompt-file" in result.err) == warns


@pytest.mark.parametrize("given", [[], ["x", "--prompt-file", "y"], ["--protecton", "open"], ["--prompt-file", "/no"]])
def test_one_prompt_and_no_misspelt_option(tsqp: Callable[..., Result], given: list[str]) -> None:
    result = tsqp("audit", *given)
    assert result.code == 2
    assert result.error


@pytest.mark.slow
def test_of_the_default_model_masked_shows_no_more_than_noise() -> None:
    options: dict[str, Any] = {"model": "default", "device": "cpu", "dtype": "auto", "threads": 2}
    in_open, verified, masked = run_audit(SECRET, MODES, **options, notes=Console(quiet=True))
    for in_clear in (in_open, verified):
        assert all(recovery.recovered_fraction >= 0.95 for recovery in in_clear.worker.recoveries)
        assert in_clear.worker.uniformity_p < 1e-9
    assert in_open.worker.recoveries[0].recovered_text == SECRET
    assert masked.dealer is not None
    for findings in (masked.worker, masked.dealer):
        assert findings.uniformity_p > 1e-6
        for recovery in findings.recoveries:
            assert recovery.recovered_fraction <= recovery.noise_fraction + 1 / TOKENS
            assert recovery.noise_fraction < 0.1
