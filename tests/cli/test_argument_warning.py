"""A private mode says that a prompt in the command line is not private."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from tests.conftest import StartWorker
from tests.families import tiny_model
from tsqp.cli.commands import app
from tsqp.cli.prompt_text import warn_of_argument
from tsqp.config.protection import PROTECTIONS

MODEL = str(tiny_model("llama").directory)


@pytest.mark.parametrize("name", PROTECTIONS)
def test_only_private_modes_warn(name: str) -> None:
    written = io.StringIO()
    for prompt in ("hello", "-", None):
        warn_of_argument(prompt, name, Console(file=written, width=40))
    lines = written.getvalue().splitlines()
    assert len(lines) == PROTECTIONS[name].checked
    assert all("use - or --prompt-file" in line for line in lines)


@pytest.mark.parametrize(("given", "warns"), [("argument", True), ("-", False), ("file", False)])
def test_only_an_argument_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    start_worker: StartWorker,
    given: str,
    warns: bool,
) -> None:
    (tmp_path / "prompt").write_text("hello")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello")))
    prompt = {"argument": ["hello"], "-": ["-"], "file": ["--prompt-file", str(tmp_path / "prompt")]}[given]
    worker = ["--worker", start_worker(MODEL, "ipc", dtype="field")]
    options = ["--protection", "masked", *worker, "--model", MODEL, "-n", "1", "--threads", "1"]
    app(["generate", *prompt, *options], exit_on_error=False, result_action="return_value")
    assert ("--prompt-file" in capsys.readouterr().err) == warns
