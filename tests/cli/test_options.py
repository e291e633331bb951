"""Flags win over TSQP_*, which win over LLAMA_*."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest

from tests.commands import Home, Result
from tsqp.api.config import ComputeConfig, GuardConfig, RunConfig, WorkerConfig
from tsqp.api.rules import OF_PADS
from tsqp.cli.commands import app
from tsqp.cli.flags import flag_of
from tsqp.cli.options import RunOptions
from tsqp.config.worker_options import parse_worker_options
from tsqp.errors import OptionError


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith(("TSQP_", "LLAMA_")):
            monkeypatch.delenv(name)


def run_options(*arguments: str) -> RunConfig:
    _, bound, _ = app.parse_args(["generate", "hello", *arguments], exit_on_error=False, print_error=False)
    run = bound.arguments.get("run", RunOptions())
    sections = (plain(part, getattr(run, part)) for part in ("worker", "guard", "compute"))
    return RunConfig(run.model, run.protection, *sections)


def plain(name: str, section: Any) -> Any:
    """A section as the API has it."""
    return type(getattr(RunConfig(), name))(**vars(section))


CASES = [
    ("model", "--model", "TSQP_MODEL", "LLAMA_MODEL_PATH", ["a", "b", "c"]),
    ("compute.dtype", "--dtype", "TSQP_DTYPE", "LLAMA_DTYPE", ["float32", "float16", "bfloat16"]),
    ("worker.device", "--device", "TSQP_DEVICE", "LLAMA_GPU_DEVICE", ["cuda:1", "cuda:2", "cuda:3"]),
    ("worker.address", "--worker", "TSQP_WORKER", "LLAMA_IPC_PATH", ["ipc:///a", "ipc:///b", "ipc:///c"]),
]


@pytest.mark.parametrize(("field", "flag", "ours", "theirs", "values"), CASES)
def test_precedence(
    monkeypatch: pytest.MonkeyPatch, field: str, flag: str, ours: str, theirs: str, values: list[str]
) -> None:
    monkeypatch.setenv("TSQP_PROTECTION", "open")  # where all of them play a part
    by_flag, by_ours, by_theirs = values
    monkeypatch.setenv(theirs, by_theirs)
    assert attrgetter(field)(run_options()) == by_theirs
    monkeypatch.setenv(ours, by_ours)
    assert attrgetter(field)(run_options()) == by_ours
    assert attrgetter(field)(run_options(flag, by_flag)) == by_flag


def test_several_workers_are_named_by_flags_or_by_a_variable_with_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_options("--worker", "ipc:///a", "--worker", "tcp://b:1").worker.addresses == ("ipc:///a", "tcp://b:1")
    keys = ("--key", "me", "--worker-key", "it")  # which play a part where any of them is reached by tcp
    assert str(run_options("--worker", "ipc:///a", "--worker", "tcp://b:1", *keys).worker.key) == "me"
    monkeypatch.setenv("TSQP_WORKER", "ipc:///a ipc:///b")
    assert run_options().worker.addresses == ("ipc:///a", "ipc:///b")
    assert run_options("--worker", "ipc:///c").worker == WorkerConfig("ipc:///c")
    monkeypatch.setenv("TSQP_WORKER_PATIENCE", "7.5")
    assert run_options().worker.patience_s == 7.5


def test_the_worker_reads_the_same_names(monkeypatch: pytest.MonkeyPatch, tsqp: Callable[..., Result]) -> None:
    """And hands them on, as flags, to the program that it becomes."""
    started: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda _, command: started.append(command))
    monkeypatch.setenv("LLAMA_IPC_PATH", "/run/llama.sock")
    monkeypatch.setenv("LLAMA_GPU_DEVICE", "1")
    monkeypatch.setenv("LLAMA_DTYPE", "float16")
    assert tsqp("worker").code == 0
    monkeypatch.setenv("TSQP_LISTEN", "ipc:///run/tsqp.sock")
    assert tsqp("worker", "--dtype", "float32").code == 0
    first, second = (parse_worker_options(command[command.index("tsqp.untrusted") + 1 :]) for command in started)
    assert (first.model, first.listen, first.device, first.dtype) == ("default", "/run/llama.sock", "cuda:1", "float16")
    assert (second.listen, second.dtype) == ("ipc:///run/tsqp.sock", "float32")


@pytest.mark.parametrize(
    "wrong", [["--threads", "0"], ["--compile", "--dtype", "field"], ["--frobnicate"], ["--listen"]]
)
def test_the_workers_wrong_options_are_one_line(tsqp: Callable[..., Result], wrong: list[str]) -> None:
    result = tsqp("worker", *wrong)
    assert result.code == 2
    assert wrong[0] in result.error


def test_the_workers_help_is_that_of_its_own_program(home: Home) -> None:
    shown = home.run("worker", "--help")
    assert shown.code == 0
    assert all(word in shown.out for word in ("--allow", "TSQP_LISTEN", "LLAMA_GPU_DEVICE", "field"))


WORKERS = {"TSQP_WORKER": "tcp://127.0.0.1:1", "TSQP_DEVICE": "cuda:9", "TSQP_PARTITION": "op"}


def test_variables_make_no_flag_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**WORKERS, "TSQP_KEY": "me", "TSQP_WORKER_KEY": "worker", "TSQP_WIRE_DTYPE": "int4"}.items():
        monkeypatch.setenv(name, value)
    assert run_options("--protection", "local") == RunConfig(protection="local")
    monkeypatch.setenv("TSQP_PROTECTION", "open")
    at_hand = run_options("--device", "cuda:1", "--wire-dtype", "float32")
    assert at_hand.worker == WorkerConfig(device="cuda:1")
    away = run_options("--worker", "ipc:///x", "--wire-dtype", "float32")
    assert (away.worker, away.compute.partition) == (WorkerConfig("ipc:///x"), "op")


def test_variables_yield_to_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WORKERS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TSQP_PROTECTION", "open")
    options = run_options()
    assert (options.worker, options.compute.partition) == (WorkerConfig("tcp://127.0.0.1:1"), "op")
    monkeypatch.setenv("TSQP_PROTECTION", "local")
    assert run_options() == RunConfig(protection="local")


def test_a_flag_never_weakens_the_protection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSQP_PROTECTION", "local")
    with pytest.raises(OptionError, match=r"local uses no worker: leave out worker\.address"):
        run_options("--worker", "ipc:///x")


def test_defaults_are_those_of_the_api() -> None:
    assert run_options() == RunConfig()


GUARD = [
    ("checks", "--checks", "TSQP_CHECKS", ["3", "4"], [3, 4]),
    ("model_digest", "--model-digest", "TSQP_MODEL_DIGEST", ["a", "b"], ["a", "b"]),
    ("pad_source", "--pad-source", "TSQP_PAD_SOURCE", ["dealer=ipc:///a", "dealer=ipc:///b"], None),
    ("pads_ahead", "--pads-ahead", "TSQP_PADS_AHEAD", ["1", "2"], [1, 2]),
    ("pad_memory", "--pad-memory", "TSQP_PAD_MEMORY", ["1GB", "512MiB"], [10**9, 512 * 2**20]),
    ("pads_empty", "--pads-empty", "TSQP_PADS_EMPTY", ["refuse", "wait"], ["refuse", "wait"]),
]


@pytest.mark.parametrize(("field", "flag", "variable", "given", "meant"), GUARD)
def test_options_of_the_guard(
    monkeypatch: pytest.MonkeyPatch, field: str, flag: str, variable: str, given: list[str], meant: list[object] | None
) -> None:
    by_flag, by_variable = meant or given
    monkeypatch.setenv(variable, given[1])
    assert getattr(run_options().guard, field) == by_variable
    assert getattr(run_options(flag, given[0]).guard, field) == by_flag


def test_variables_of_the_guard_are_for_other_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {variable: given[0] for _, _, variable, given, _ in GUARD}
    others = {"TSQP_WARM_PADS": "1", "TSQP_DEALER_NO_SEPARATION": "1", "TSQP_DEALER_KEY": "x"}
    for name, value in {**values, **others}.items():
        monkeypatch.setenv(name, value)
    assert run_options("--protection", "open").guard == GuardConfig()
    assert run_options("--protection", "local").guard == GuardConfig()
    assert run_options("--protection", "verified").guard == GuardConfig(checks=3, model_digest="a")
    chosen = run_options().guard
    assert (chosen.dealer, chosen.warm_pads, chosen.dealer_no_separation) == ("ipc:///a", True, True)
    monkeypatch.delenv("TSQP_PAD_SOURCE")
    assert run_options().guard.dealer_key is None  # and of a dealer, where there is none


def test_memory_for_keys_and_values_is_for_runs_that_keep_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSQP_KV_MEMORY", "512MiB")
    assert run_options().compute.kv_memory == 512 * 2**20
    assert run_options("--kv-memory", "1GB").compute.kv_memory == 10**9
    assert run_options("--protection", "open", "--partition", "op").compute.kv_memory == 512 * 2**20
    assert run_options("--protection", "open", "--partition", "layer").compute == ComputeConfig("layer")


def test_keys_for_a_dealer_are_for_other_runs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PAD_SOURCE": "dealer=tcp://192.0.2.1:7", "DEALER_KEY": "d", "KEY": "me"}.items():
        monkeypatch.setenv(f"TSQP_{name}", value)
    assert run_options("--protection", "verified") == RunConfig(protection="verified")
    assert str(run_options().worker.key) == "me"


NUMBERS = {"TSQP_DTYPE": "bfloat16", "TSQP_WIRE_DTYPE": "int8", "TSQP_COMPILED_KERNELS": "0"}


def test_a_private_mode_has_numbers_of_its_own_whatever_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**NUMBERS, "TSQP_PARTITION": "layer"}.items():
        monkeypatch.setenv(name, value)
    options = run_options("--protection", "masked")
    assert options.compute == ComputeConfig()
    with pytest.raises(OptionError, match="--protection open"):  # the default does not decide what the user meant
        run_options()


def test_help_is_in_groups(home: Home) -> None:
    shown = home.run("generate", "--help").out
    titles = ("Prompt", "Model and split", "Privacy", "Pads", "Worker connection", "Sampling", "Output")
    places = [shown.index(f"─ {title} ─") for title in titles]
    assert places == sorted(places)
    assert places[2] < shown.index("--protection") < shown.index("--model-digest") < places[3]
    pads = shown[places[3] : places[4]]
    flags = [flag_of(name) for name in OF_PADS]
    assert all(flag in pads for flag in flags)
    assert pads.count("masked") >= len(flags)


def test_a_key_may_be_for_a_dealer_alone() -> None:
    dealer = ("--pad-source", "dealer=tcp://192.0.2.1:7", "--dealer-key", "d", "--key", "me")
    assert str(run_options(*dealer).worker.key) == "me"
    with pytest.raises(OptionError, match=r"leave out worker\.key"):
        run_options("--key", "me")
