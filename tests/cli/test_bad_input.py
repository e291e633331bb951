"""Whatever is wrong with the input, the user reads one clear line, and the exit code says whose fault it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import LIMIT_S, TSQP, Home, Result
from tests.families import CONTEXT, byte_tokenizer, tiny_model

DIRECTORY = tiny_model("llama").directory
MODEL = ("--model", str(DIRECTORY))
LOCAL = ("--protection", "local")
Command = Callable[..., Result]

USAGE: dict[str, tuple[list[str], str]] = {
    "no prompt": (["generate", *MODEL], "give one prompt"),
    "two prompts": (["generate", "a", "--prompt-file", "x", *MODEL], "give one prompt"),
    "empty prompt": (["generate", "", *MODEL, *LOCAL], "prompt is empty"),
    "blank prompt": (["generate", " \n ", *MODEL, *LOCAL], "prompt is empty"),
    "prompt longer than the context": (["generate", "x" * CONTEXT, *MODEL, *LOCAL], "shorten the prompt"),
    "prompt file missing": (["generate", "--prompt-file", "nowhere.txt", *MODEL], "nowhere.txt"),
    "unknown option": (["generate", "a", "--frobnicate", "3"], "--frobnicate"),
    "unknown option instead of a prompt": (["generate", "--frobnicate"], "--frobnicate"),
    "unknown command": (["genrate"], "genrate"),
    "unknown protection": (["generate", "a", "--protection", "hidden"], "hidden"),
    "unknown partition": (["generate", "a", "--partition", "layers"], "layers"),
    "unknown dtype": (["generate", "a", "--dtype", "int4"], "int4"),
    "not a number": (["generate", "a", "--max-tokens", "many"], "many"),
    "out of range": (["generate", "a", "--top-p", "7", *MODEL], "--top-p must be"),
    "chunk of zero": (["generate", "a", "--prefill-chunk", "0", *MODEL], "chunk"),
    "no threads": (["generate", "a", "--threads", "0", *MODEL], "threads"),
    "fewer threads than none": (["generate", "a", "--threads", "-1", *MODEL], "threads"),
    "no time": (["generate", "a", "--deadline", "0", *MODEL], "deadline"),
    "endless time": (["generate", "a", "--deadline", "inf", *MODEL], "deadline"),
    "no time at all": (["generate", "a", "--deadline", "nan", *MODEL], "deadline"),
    "stop token below 0": (["generate", "a", "--stop-token", "-1", *MODEL], "--stop-token must be"),
    "penalty out of range": (
        ["generate", "a", "--repetition-penalty", "1e-40", *MODEL],
        "--repetition-penalty must be",
    ),
    "argument that is not UTF-8": (["generate", "a\udcff", *MODEL], "UTF-8"),
    "system message that is not UTF-8": (["chat", "--system", "a\udcff", "--model", "default", *LOCAL], "UTF-8"),
    **{
        f"{flag} without a worker": (["generate", "a", *MODEL, *LOCAL, flag, *value], flag)
        for flag, value in {
            "--worker": ["ipc:///x"],
            "--partition": ["linear"],
            "--device": ["cpu"],
            "--wire-dtype": ["float32"],
            "--deadline": ["5"],
            "--key": ["x"],
            "--worker-key": ["x"],
            "--insecure-plain-tcp": [],
        }.items()
    },
    "device of another's worker": (["generate", "a", *MODEL, "--worker", "ipc:///x", "--device", "cpu"], "--device"),
    "keys for a worker started here": (["generate", "a", *MODEL, "--key", "x", "--worker-key", "y"], "--worker-key"),
    "keys for ipc": (["generate", "a", *MODEL, "--worker", "ipc:///x", "--key", "x"], "--key"),
    "not an address": (["generate", "a", *MODEL, "--worker", "http://x"], "http"),
    "path too long": (["generate", "a", *MODEL, "--worker", "ipc:///" + "x" * 200], "107"),
    "plain tcp without tcp": (["chat", *MODEL, "--insecure-plain-tcp"], "--insecure-plain-tcp"),
}


@pytest.mark.parametrize("prompt", ["", " \n "])
def test_an_empty_prompt_is_refused_before_a_model_is_looked_for(tsqp: Command, prompt: str) -> None:
    result = tsqp("generate", prompt, "--model", "/nowhere")
    assert result.code == 2
    assert "prompt is empty" in result.error


@pytest.mark.parametrize("mistyped", [["--foo", "5", "-"], ["--foo=5", "-"], ["-", "--foo"]])
def test_a_mistyped_option_is_named_wherever_it_stands(tsqp: Command, mistyped: list[str]) -> None:
    result = tsqp("generate", *mistyped, *MODEL, *LOCAL)
    assert result.code == 2
    assert "--foo" in result.error


@pytest.mark.parametrize("name", USAGE)
def test_wrong_use(tsqp: Command, name: str) -> None:
    arguments, words = USAGE[name]
    result = tsqp(*arguments)
    assert result.code == 2
    assert words in result.error
    assert result.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["-my secret"],
        ["--my secret"],
        ["-my", "secret"],
        ["public", "my secret"],
        ["public", "--my secret"],
        ["public", "--option=my secret"],
        ["--" + "secret" * 10],
    ],
)
def test_an_error_about_the_command_line_repeats_no_prompt(tsqp: Command, arguments: list[str]) -> None:
    result = tsqp("generate", *arguments, *MODEL, *LOCAL)
    assert result.code == 2
    assert "secret" not in result.error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["generat", "my secret"],
            "no command generat: use one of api-key, audit, bench, chat, cluster, doctor, eval, generate, ",
        ),
        (["bench", "decod"], "no command decod: use one of all, constants, decode, guard, "),
        (
            ["my secret"],
            "no such command: use one of api-key, audit, bench, chat, cluster, doctor, eval, generate, keys, model, ",
        ),
    ],
)
def test_an_unknown_command_gets_the_names_of_all(tsqp: Command, arguments: list[str], said: str) -> None:
    result = tsqp(*arguments)
    assert result.code == 2
    assert said in result.error
    assert "secret" not in result.error


@pytest.mark.parametrize("address", ["foo://x", "tcp://host", "ipc://"])
def test_what_is_no_address_is_wrong_use(tsqp: Command, address: str) -> None:
    result = tsqp("generate", "a", *MODEL, "--worker", address)
    assert result.code == 2
    assert "malformed address" in result.error


def test_a_worker_that_does_not_start_is_said_to_be_in_error_once(tsqp: Command) -> None:
    result = tsqp("generate", "a", *MODEL, "--protection", "open", "--device", "cuda:99")
    assert result.code == 1
    assert result.error.count("error:") == 1
    assert "did not start: there is no device 'cuda:99' here" in result.error


def test_a_prompt_may_begin_with_a_hyphen(tsqp: Command) -> None:
    for prompt in ("-foo bar", "--debug", "--help"):
        result = tsqp("generate", *MODEL, *LOCAL, "--dtype", "float32", "-n", "4", "--json", "--", prompt)
        assert result.code == 0, result.err
        tokens = byte_tokenizer().encode(prompt).ids
        assert result.json["token_ids"] == tiny_model("llama").greedy(tokens, 4)


FAILURES: dict[str, tuple[list[str], str]] = {
    "no such model": (["generate", "a", "--model", "/nowhere/model"], "/nowhere/model"),
    "unknown synthetic": (["generate", "a", "--model", "synthetic:gpt-9"], "gpt-9"),
    "unreachable ipc": (["generate", "a", *MODEL, "--worker", "ipc:///nowhere/x.sock"], "ipc:///nowhere/x.sock"),
    "unreachable tcp": (["generate", "a", *MODEL, "--worker", "tcp://127.0.0.1:1"], "tcp://127.0.0.1:1"),
    "plain tcp off loopback": (["generate", "a", *MODEL, "--worker", "tcp://192.0.2.1:7000"], "--insecure-plain-tcp"),
    "auto worker cannot start": (["generate", "a", *MODEL, "--device", "cuda:99"], "cuda:99"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures(tsqp: Command, home: Home, name: str) -> None:
    arguments, words = FAILURES[name]
    result = tsqp(*arguments)
    assert result.code == 1
    assert words in result.error
    assert home.leftovers() == []


WORKER: dict[str, tuple[list[str], int, str]] = {
    "unknown device": (["--device", "tpu"], 2, "tpu"),
    "no such device": (["--device", "cuda:99"], 2, "cuda:99"),
    "plain tcp off loopback": (["--listen", "tcp://0.0.0.0:0"], 1, "--insecure-plain-tcp"),
    "path too long": (["--listen", "ipc:///" + "x" * 200], 2, "107"),
    "half of the keys": (["--listen", "tcp://127.0.0.1:0", "--key", "x"], 2, "--allow"),
}


@pytest.mark.parametrize("name", WORKER)
def test_a_worker_that_cannot_start(home: Home, name: str) -> None:
    arguments, code, words = WORKER[name]
    result = home.run("worker", *MODEL, *arguments)
    assert result.code == code
    assert words in result.error
    assert home.leftovers() == []


def broken(tmp_path: Path, change: str) -> Path:
    """A copy of a good checkpoint with one thing wrong."""
    copy = tmp_path / "model"
    shutil.copytree(DIRECTORY, copy)
    weights, config = copy / "model.safetensors", copy / "config.json"
    match change:
        case "truncated weights":
            os.truncate(weights, weights.stat().st_size // 2)
        case "garbage weights":
            weights.write_bytes(b"\xff" * 1000)
        case "no weights":
            weights.unlink()
        case "garbage config":
            config.write_text("{")
        case "no config":
            config.unlink()
        case "no tokenizer":
            (copy / "tokenizer.json").unlink()
        case "garbage tokenizer":
            (copy / "tokenizer.json").write_text("{}")
        case "added tokens that are none":
            path = copy / "tokenizer.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "added_tokens": 5}))
        case "a template with a list for a name":
            entries = [{"name": ["default"], "template": "x"}, {"name": "default", "template": 3}]
            (copy / "tokenizer_config.json").write_text(json.dumps({"chat_template": entries}))
        case "too many layers":
            config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 10**9}))
        case "another architecture":
            config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "mamba"}))
        case "another rope":
            config.write_text(
                json.dumps({**json.loads(config.read_text()), "rope_parameters": {"rope_type": "mrope", "factor": 2}})
            )
    return copy


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("truncated weights", "model.safetensors"),
        ("garbage weights", "model.safetensors"),
        ("no weights", "safetensors"),
        ("garbage config", "config.json"),
        ("no config", "config.json"),
        ("no tokenizer", "tokenizer.json"),
        ("garbage tokenizer", "tokenizer"),
        ("added tokens that are none", "tokenizer"),
        ("a template with a list for a name", "chat_template"),
        ("too many layers", "1000000000 layers"),
        ("another architecture", "mamba"),
        ("another rope", "mrope"),
    ],
)
def test_broken_checkpoints(tsqp: Command, tmp_path: Path, change: str, words: str) -> None:
    result = tsqp("generate", "a", "--model", broken(tmp_path, change), *LOCAL)
    assert result.code == 1
    assert words in result.error
    assert result.out == ""


def test_a_truncated_gguf(tsqp: Command, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00\xff\xff")
    result = tsqp("generate", "a", "--model", path, *LOCAL)
    assert result.code == 1
    assert "model.gguf" in result.error


@pytest.mark.slow
def test_an_address_in_use(home: Home) -> None:
    with home.worker(*MODEL) as (_, address):
        result = home.run("worker", *MODEL, "--listen", address)
        assert result.code == 1
        assert address in result.error
        assert home.run("generate", "a", *MODEL, "--worker", address, "-n", "2").code == 0  # the first is unharmed


@pytest.mark.slow
def test_another_model_on_the_worker(home: Home) -> None:
    with home.worker("--model", tiny_model("llama-biases").directory) as (_, address):
        result = home.run("generate", "a", *MODEL, "--worker", address)
        assert result.code == 1
        assert address in result.error
        assert "--model" in result.error


def test_a_runtime_directory_that_is_not_ours_alone(home: Home) -> None:
    directory = home.runtime / "tsqp"
    directory.mkdir()
    directory.chmod(0o777)
    result = home.run("generate", "a", *MODEL)
    assert result.code == 1
    assert str(directory) in result.error


def test_a_prompt_that_is_not_text(tsqp: Command, tmp_path: Path) -> None:
    path = tmp_path / "prompt"
    path.write_bytes(b"\xff\xfe\x00")
    result = tsqp("generate", "--prompt-file", path, *MODEL)
    assert result.code == 2
    assert "UTF-8" in result.error


@pytest.mark.slow
def test_a_line_of_chat_that_is_not_text(home: Home) -> None:
    command = [*TSQP, "chat", "--model", "default", *LOCAL]
    for locale in ("C.UTF-8", "POSIX"):  # refused when read, or handed on
        environment = {**home.environment, "LC_ALL": locale}
        done = subprocess.run(
            command, input=b"\xff\n", env=environment, capture_output=True, timeout=LIMIT_S, check=False
        )
        assert b"UTF-8" in done.stderr
        assert b"Traceback" not in done.stderr


def test_an_output_that_cannot_hold_the_answer(home: Home) -> None:
    result = home.run("generate", "a", *MODEL, *LOCAL, "--ignore-eos", "-n", "100", PYTHONIOENCODING="ascii")
    assert result.code == 0, result.err
    assert "?" in result.out


def test_a_variable_for_a_key_is_for_tcp_alone(home: Home, tmp_path: Path) -> None:
    """Whoever has set it for other commands may start a worker that needs none."""
    key, model = str(tmp_path / "no.key_secret"), ("--model", "/nowhere/model")
    result = home.run("worker", *model, "--listen", "shm:///tmp/w.sock", TSQP_KEY=key)
    assert (result.code, "/nowhere/model" in result.err) == (1, True)
    result = home.run("worker", *MODEL, TSQP_LISTEN="tcp://127.0.0.1:0", TSQP_KEY=key)
    assert (result.code, "--allow" in result.err) == (2, True), result.err


@pytest.mark.parametrize("command", [("generate", "a"), ("worker",)], ids=["generate", "worker"])
def test_debug_shows_the_traceback(command: tuple[str, ...], home: Home) -> None:
    result = home.run(*command, "--model", "/nowhere/model", "--debug")
    assert result.code == 1
    assert "Traceback" in result.err
    assert "CheckpointNotFound" in result.err
