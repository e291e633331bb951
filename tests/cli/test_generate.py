"""``tsqp generate`` and ``tsqp chat`` as a user meets them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands import LIMIT_S, Home, Result
from tests.families import byte_tokenizer, tiny_model
from tests.words import TEMPLATE, words_model
from tsqp import LLM, ComputeConfig, SamplingParams, TsqpError
from tsqp.config.partition import PARTITIONS
from tsqp.trusted.text.tokenizer import ChatMessage

MODEL = ("--model", str(tiny_model("llama").directory))
KEYS = {"text", "token_ids", "protection", "partition", "transport", "address", "dtype", "device", "stats"}
STATS = {"rpc_calls", "bytes_sent", "bytes_received", "prefill_s", "decode_s", "tokens_per_s"}
OPEN = ("--protection", "open")
PROMPT = "The quick brown fox"
WARNING = "the worker sees the activations in clear"
Command = Callable[..., Result]


def expected_tokens(count: int) -> list[int]:
    return tiny_model("llama").greedy(byte_tokenizer().encode(PROMPT).ids, count)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_a_worker_is_started_used_and_stopped(tsqp: Command, home: Home, partition: str) -> None:
    run = ("--dtype", "float32", "--partition", partition, "-n", "8", "--json")
    result = tsqp("generate", PROMPT, *MODEL, *OPEN, *run)
    assert result.code == 0, result.err
    answer = result.json
    assert answer.keys() >= KEYS
    assert answer["stats"].keys() >= STATS
    assert answer["token_ids"] == expected_tokens(8)
    assert (answer["protection"], answer["partition"], answer["transport"]) == ("open", partition, "shm")
    assert answer["address"].startswith(f"shm://{home.runtime}/tsqp/")
    assert answer["stats"]["rpc_calls"] == 8 * PARTITIONS[partition].calls_per_pass(2)
    assert result.err.count(WARNING) == 1
    assert answer["address"] in result.err.replace("\n", "")  # the address really in use is shown
    assert home.leftovers() == []


@pytest.mark.parametrize(
    ("template", "raw", "space"), [(None, (), " "), (TEMPLATE, (), ""), (TEMPLATE, ("--raw",), " ")], ids=str
)
def test_an_answer_goes_on_with_a_text_or_is_a_turn(
    tsqp: Command, tmp_path: Path, template: str | None, raw: tuple[str, ...], space: str
) -> None:
    """In a vocabulary whose tokens have the space before them, which the first of a text goes without."""
    model = words_model(tmp_path, template)
    run = ("--model", model, "--dtype", "float32", "--protection", "local", "-n", "3", *raw)
    plain, told = tsqp("generate", "w3 w4", *run), tsqp("generate", "w3 w4", *run, "--json").json
    words = " ".join(f"w{token}" for token in told["token_ids"])
    assert told["text"] == f"{space}{words}"
    assert plain.out == f"{space}{words}\n"


def test_local_uses_no_worker(tsqp: Command) -> None:
    run = ("--dtype", "float32", "--protection", "local", "-n", "8", "--json", "--stats")
    result = tsqp("generate", PROMPT, *MODEL, *run)
    assert result.code == 0, result.err
    assert "calls to the worker" not in result.err
    answer = result.json
    assert all(row["rpc_s"] == 0 for row in answer["stats"]["calls"].values())
    assert answer["stats"]["calls"]["linear"]["held_s"] > 0
    assert answer["token_ids"] == expected_tokens(8)
    assert (answer["partition"], answer["transport"], answer["address"]) == (None, None, None)
    assert answer["stats"]["rpc_calls"] == 0
    assert WARNING not in result.err


def test_text_streams_to_stdout_and_everything_else_to_stderr(home: Home) -> None:
    result = home.run("generate", PROMPT, *MODEL, *OPEN, "--dtype", "float32", "-n", "8", "--stats")
    assert result.code == 0, result.err
    assert result.out == byte_tokenizer().decode(expected_tokens(8)) + "\n"
    assert "calls to the worker" in result.err
    assert "communication:" not in result.err  # which takes a trace, and a trace takes the slower way
    assert "\nread 1 file of 0.00 GB in " in result.err or "\nread no file in " in result.err
    for row in ("linear", "LM head", "embedding", "matmul", "RMSNorm", "rotary", "softmax", "SiLU", "other"):
        assert row in result.err


def test_the_warning_comes_before_anything_else(tsqp: Command, home: Home) -> None:
    result = tsqp("generate", PROMPT, *MODEL, *OPEN, "-n", "1")
    mode, *_, line = result.err.splitlines()
    assert WARNING in mode
    assert f"shm://{home.runtime}/tsqp/" in line


@pytest.mark.parametrize(
    "options",
    [("--model", "/nowhere"), (*MODEL, "--device", "cuda:99"), (*MODEL, "--worker", "tcp://127.0.0.1:1")],
    ids=["model", "device", "worker"],
)
@pytest.mark.parametrize("command", [("generate", PROMPT), ("chat",)], ids=str)
def test_the_warning_comes_even_when_nothing_else_does(
    tsqp: Command, command: tuple[str, ...], options: tuple[str, ...]
) -> None:
    result = tsqp(*command, *options, *OPEN)
    assert result.code == 1
    mode, *_, error = result.err.splitlines()
    assert WARNING in mode
    assert ": error: " in error


def test_the_warning_comes_before_a_worker_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def stop(name: str) -> Any:
        def stopped(*_: object, **__: object) -> None:
            order.append(name)
            raise TsqpError(name)

        return stopped

    monkeypatch.setattr("tsqp.api.open_model.locate", stop("fetch"))
    with pytest.raises(TsqpError, match="fetch"):
        LLM("default", protection="open", announce=lambda plan: order.append(plan.protection.name))
    assert order == ["open", "fetch"]


@pytest.mark.parametrize("how", ["argument", "stdin", "file", "file-stdin"])
def test_the_prompt_comes_from_where_the_user_says(tsqp: Command, how: str, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT)
    arguments, stdin = {
        "argument": ([PROMPT], ""),
        "stdin": (["-"], PROMPT + "\n"),
        "file": (["--prompt-file", str(path)], ""),
        "file-stdin": (["--prompt-file", "-"], PROMPT),
    }[how]
    options = ("--protection", "local", "--dtype", "float32", "-n", "4", "--json")
    result = tsqp("generate", *arguments, *MODEL, *options, stdin=stdin)
    assert result.json["token_ids"] == expected_tokens(4)


def test_sampling_is_repeatable_with_a_seed(tsqp: Command) -> None:
    options = ("--protection", "local", "--temperature", "1.5", "-n", "12", "--json")
    runs = [tsqp("generate", PROMPT, *MODEL, *options, "--seed", seed).json["token_ids"] for seed in ("1", "1", "2")]
    assert runs[0] == runs[1] != runs[2]


def test_a_stop_string_ends_the_answer(tsqp: Command) -> None:
    whole = tsqp("generate", PROMPT, *MODEL, "--protection", "local", "-n", "40", "--json").json["text"]
    stop = next(c for c in whole[2:] if c.isascii() and c.isprintable() and c not in whole[:2])
    options = ("--protection", "local", "-n", "40", "--json", "--stop", stop)
    assert tsqp("generate", PROMPT, *MODEL, *options).json["text"] == whole[: whole.index(stop)]


def test_stop_tokens_end_the_answer(tsqp: Command) -> None:
    tokens = expected_tokens(12)
    stop = next(token for token in tokens if token != tokens[0])
    options = ("--protection", "local", "--dtype", "float32", "-n", "12", "--json", "--stop-token", "319")
    answer = tsqp("generate", PROMPT, *MODEL, *options, "--stop-token", str(stop)).json
    assert (answer["token_ids"], answer["finish_reason"]) == (tokens[: tokens.index(stop)], "stop")


@pytest.mark.slow
def test_chat_keeps_the_conversation_until_it_is_reset(home: Home) -> None:
    first, second = "My name is Ada.", "Say it again."
    options = ("--protection", "local", "--dtype", "float32", "-n", "12")
    result = home.run("chat", *options, stdin=f"{first}\n\n{second}\n/reset\n{second}\n/exit\nnever read\n")
    assert result.code == 0, result.err
    assert "forgotten" in result.err

    def answer(*turns: str) -> str:
        roles = ("user", "assistant", "user")
        messages = [ChatMessage(role=role, content=turn) for role, turn in zip(roles, turns, strict=False)]
        return "".join(delta.text for delta in llm.chat(messages, SamplingParams(max_tokens=12)))

    with LLM("default", protection="local", compute=ComputeConfig(dtype="float32", threads=1)) as llm:
        hello = answer(first)
        assert result.out == f"{hello}\n{answer(first, hello, second)}\n{answer(second)}\n"


def test_chat_needs_a_template(tsqp: Command) -> None:
    result = tsqp("chat", *MODEL, "--protection", "local", stdin="hello\n")
    assert result.code == 2
    assert "chat template" in result.error


def test_a_variable_set_to_nothing_is_not_set(home: Home) -> None:
    result = home.run("generate", PROMPT, *MODEL, "-n", "1", "--json", TSQP_WORKER="", TSQP_DTYPE="", LLAMA_IPC_PATH="")
    assert result.code == 0, result.err
    assert result.json["address"].startswith("shm://")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_closed_stream_is_no_traceback(home: Home, closed: str) -> None:
    command = f"exec {sys.executable} -m tsqp generate - --protection local --model synthetic:tiny -n 1 {closed}"
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        env=home.environment,
        input=b"hello",
        capture_output=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == (2 if closed == "<&-" else 0)
    assert b"Traceback" not in done.stderr
