"""Flags are made of the fields of the configuration, and fields in errors become flags again."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Home
from tsqp.api.config import ComputeConfig, GuardConfig, RunConfig, WorkerConfig
from tsqp.cli.commands import app
from tsqp.cli.flags import flag_of, flags_of, option_type, parse_size
from tsqp.errors import OptionError
from tsqp.trusted.engine.sampling_params import SamplingParams

CONFIGS = (RunConfig, WorkerConfig, GuardConfig, ComputeConfig, SamplingParams)
OPTIONS = [one for config in CONFIGS for one in fields(config) if "help" in one.metadata]
KNOWN = {  # flags that users type, and the variables that stand for them
    "--worker": ["TSQP_WORKER", "LLAMA_IPC_PATH"],
    "--device": ["TSQP_DEVICE", "LLAMA_GPU_DEVICE"],
    "--model": ["TSQP_MODEL", "LLAMA_MODEL_PATH"],
    "--dtype": ["TSQP_DTYPE", "LLAMA_DTYPE"],
    "--wire-dtype": ["TSQP_WIRE_DTYPE"],
    "--worker-key": ["TSQP_WORKER_KEY"],
    "--pad-memory": ["TSQP_PAD_MEMORY"],
    "--arena": ["TSQP_ARENA"],
    "--kv-memory": ["TSQP_KV_MEMORY"],
    "--no-compiled-kernels": ["TSQP_COMPILED_KERNELS"],
    "--deadline": [],
    "--compile": [],
    "--stop-token": [],
}


def flags() -> dict[str, Any]:
    """The arguments of ``tsqp generate`` by each of their names."""
    found = app["generate"].assemble_argument_collection()
    return {name: argument for argument in found for name in argument.names}


def test_there_are_options_and_sections() -> None:
    sections = {one.name for one in fields(RunConfig)} - {one.name for one in OPTIONS}
    assert sections == {"worker", "guard", "compute"}
    assert len({one.name for one in OPTIONS}) == len(OPTIONS)  # so that a name without its section has one flag


@pytest.mark.parametrize("one", OPTIONS, ids=lambda one: one.name)
def test_each_field_is_a_flag_with_its_help_and_its_default(one: Field[Any]) -> None:
    argument = flags()[flag_of(one.name)]
    assert argument.parameter.help == one.metadata["help"]
    assert argument.field_info.default == one.default
    assert one.default is not MISSING


@pytest.mark.parametrize("flag", KNOWN)
def test_flags_and_variables_keep_their_names(flag: str) -> None:
    assert list(flags()[flag].parameter.env_var or ()) == KNOWN[flag]


def test_only_what_is_safe_to_forget_has_a_variable() -> None:
    """A variable that is set for good would open every later run."""
    assert not flags()["--insecure-plain-tcp"].parameter.env_var
    assert flags()["--protection"].parameter.env_var == ("TSQP_PROTECTION",)


def test_another_default_changes_nothing_else() -> None:
    bench = flags_of(RunConfig, protection="open")()
    assert (bench.protection, bench.model) == ("open", "default")
    assert isinstance(bench, RunConfig)
    assert flags_of(RunConfig)().protection == "masked"
    assert option_type("compute", "threads").__metadata__[0].name == ("--threads",)


@pytest.mark.parametrize(
    ("field", "flag"),
    [("guard.pad_memory", "--pad-memory"), ("worker.address", "--worker"), ("arena_bytes", "--arena")],
)
def test_a_field_has_its_flag_with_and_without_its_section(field: str, flag: str) -> None:
    assert flag_of(field) == flag
    assert flag_of(field.rpartition(".")[2]) == flag


def test_a_key_file_that_is_not_there_is_an_error_of_one_line(home: Home, tmp_path: Path) -> None:
    tcp = ("--worker", "tcp://127.0.0.1:1", "--key", tmp_path / "me", "--worker-key", tmp_path / "it")
    result = home.run("generate", "x", "--protection", "open", *tcp)
    assert result.code == 1
    assert "cannot read the" in result.error


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1000", 1000),
        ("512MB", 512_000_000),
        ("2GB", 2 * 10**9),
        ("2g", 2 * 10**9),
        ("1GiB", 2**30),
        ("1.5 kib", 1536),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--x") == size


@pytest.mark.parametrize("text", ["", "MB", "-1", "1XB", "1 2", "nan", "1e3", "9" * 400])
def test_no_sizes(text: str) -> None:
    with pytest.raises(OptionError, match="is no size"):
        parse_size(text, "--x")
