"""Flags win over TSQP_*, which win over LLAMA_*."""

from __future__ import annotations

import pytest

from tsqp.app.cli import app
from tsqp.app.options import RunOptions, WorkerOptions


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


def test_defaults() -> None:
    options = run_options()
    assert (options.model, options.protection, options.partition) == ("default", "open", "linear")
    assert (options.dtype, options.device, options.worker) == ("bfloat16", "cpu", None)
