"""Flags win over TSQP_*, which win over LLAMA_*."""

from __future__ import annotations

import pytest

from tsqp.app.cli import app
from tsqp.app.options import RunOptions, WorkerOptions
from tsqp.errors import OptionError


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith(("TSQP_", "LLAMA_")):
            monkeypatch.delenv(name)


def run_options(*arguments: str) -> RunOptions:
    _, bound, _ = app.parse_args(["generate", "hello", *arguments], exit_on_error=False, print_error=False)
    return bound.arguments.get("run", RunOptions())


def worker_options(*arguments: str) -> WorkerOptions:
    _, bound, _ = app.parse_args(["worker", *arguments], exit_on_error=False, print_error=False)
    return bound.arguments.get("options", WorkerOptions())


CASES = [
    ("model", "--model", "TSQP_MODEL", "LLAMA_MODEL_PATH", ["a", "b", "c"]),
    ("dtype", "--dtype", "TSQP_DTYPE", "LLAMA_DTYPE", ["float32", "float16", "bfloat16"]),
    ("device", "--device", "TSQP_DEVICE", "LLAMA_GPU_DEVICE", ["cuda:1", "cuda:2", "cuda:3"]),
    ("worker", "--worker", "TSQP_WORKER", "LLAMA_IPC_PATH", ["ipc:///a", "ipc:///b", "ipc:///c"]),
]


@pytest.mark.parametrize(("field", "flag", "ours", "theirs", "values"), CASES)
def test_precedence(
    monkeypatch: pytest.MonkeyPatch, field: str, flag: str, ours: str, theirs: str, values: list[str]
) -> None:
    by_flag, by_ours, by_theirs = values
    monkeypatch.setenv(theirs, by_theirs)
    assert getattr(run_options(), field) == by_theirs
    monkeypatch.setenv(ours, by_ours)
    assert getattr(run_options(), field) == by_ours
    assert getattr(run_options(flag, by_flag), field) == by_flag


def test_the_worker_reads_the_same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_IPC_PATH", "/run/llama.sock")
    monkeypatch.setenv("LLAMA_GPU_DEVICE", "1")
    monkeypatch.setenv("LLAMA_DTYPE", "float16")
    options = worker_options()
    assert (options.listen, options.device, options.dtype) == ("/run/llama.sock", "cuda:1", "float16")
    monkeypatch.setenv("TSQP_LISTEN", "ipc:///run/tsqp.sock")
    assert worker_options().listen == "ipc:///run/tsqp.sock"


WORKERS = {"TSQP_WORKER": "tcp://127.0.0.1:1", "TSQP_DEVICE": "cuda:9", "TSQP_PARTITION": "op"}


def test_variables_make_no_flag_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**WORKERS, "TSQP_KEY": "me", "TSQP_WORKER_KEY": "worker", "TSQP_WIRE_DTYPE": "int4"}.items():
        monkeypatch.setenv(name, value)
    assert run_options("--protection", "local") == RunOptions(protection="local")
    at_hand = run_options("--device", "cuda:1", "--wire-dtype", "float32")
    assert (at_hand.worker, at_hand.device, at_hand.key) == (None, "cuda:1", None)
    away = run_options("--worker", "ipc:///x", "--wire-dtype", "float32")
    assert (away.worker, away.device, away.partition, away.key) == ("ipc:///x", "cpu", "op", None)


def test_variables_yield_to_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WORKERS.items():
        monkeypatch.setenv(name, value)
    options = run_options()
    assert (options.worker, options.device, options.partition) == ("tcp://127.0.0.1:1", "cpu", "op")
    monkeypatch.setenv("TSQP_PROTECTION", "local")
    assert run_options() == RunOptions(protection="local")


def test_a_flag_never_weakens_the_protection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSQP_PROTECTION", "local")
    with pytest.raises(OptionError, match="local uses no worker: leave out --worker"):
        run_options("--worker", "ipc:///x")


def test_defaults() -> None:
    options = run_options()
    assert (options.model, options.protection, options.partition) == ("default", "open", "linear")
    assert (options.dtype, options.device, options.worker) == ("auto", "cpu", None)
