"""llm, the command: its file of further models of OpenAI's API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conformance.target import Target

LLM = Path(sys.executable).with_name("llm")
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def llm(target: Target, tmp_path: Path) -> Command:
    """The command, with the server as three models: of chat, of completions, of responses."""
    models = [
        {"model_id": "chat", "supports_schema": True, "supports_tools": True},
        {"model_id": "text", "completion": True},
        {"model_id": "items", "responses": True, "supports_schema": True, "supports_tools": True},
    ]
    common = {"model_name": target.model, "api_base": target.api, "api_key_name": "tsqp"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([{**one, **common} for one in models]))
    (tmp_path / "keys.json").write_text(json.dumps({"tsqp": target.key}))

    def run(*arguments: str, key: str | None = None) -> subprocess.CompletedProcess[str]:
        more = [] if key is None else ["--key", key]
        environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
        return subprocess.run(
            [LLM, *arguments, *more], env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    return run


def answered(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("model", ["chat", "items", "text"])
def test_a_prompt(llm: Command, model: str) -> None:
    asked = ["prompt", "Hello?", "-m", model, "-o", "temperature", "0", "-o", "max_tokens", "24"]
    if model != "text":
        asked += ["-s", "Be brief."]
    streamed = answered(llm(*asked))
    assert streamed.strip()
    if model == "text":
        return
    assert answered(llm(*asked, "--no-stream")) == streamed
    logs = json.loads(answered(llm("logs", "--json", "-n", "2")))
    told = {(log["input_tokens"], log["output_tokens"]) for log in logs}
    if model == "items":
        told.discard((None, None))  # of a stream that was cut, which ends with response.incomplete, it reads no usage
    ((asked_tokens, answer_tokens),) = told
    assert asked_tokens > 0
    assert answer_tokens == 24


@pytest.mark.parametrize("model", ["chat", "items"])
def test_a_schema(llm: Command, model: str) -> None:
    for more in ([], ["--no-stream"]):
        said = answered(llm("prompt", "Which?", "-m", model, "--schema", json.dumps(SCHEMA), *more))
        assert json.loads(said)["city"] in ("Oslo", "Rome")


@pytest.mark.parametrize("model", ["chat", "items"])
def test_tools_are_offered(llm: Command, model: str) -> None:
    function = "def add(a: int, b: int) -> int:\n    return a + b"
    assert answered(llm("prompt", "1 + 1?", "-m", model, "--functions", function, "-o", "max_tokens", "24")) is not None


def test_a_conversation_goes_on(llm: Command) -> None:
    answered(llm("prompt", "Hello?", "-m", "chat", "-o", "max_tokens", "8"))
    assert answered(llm("prompt", "And now?", "-c", "-o", "max_tokens", "8"))


def test_errors_are_one_line(llm: Command) -> None:
    for done, word in (
        (llm("prompt", "x", "-m", "chat", key="wrong"), "API key"),
        (llm("prompt", "x", "-m", "chat", "-o", "max_tokens", "100000"), "context"),
    ):
        assert done.returncode != 0
        assert word in done.stderr
        assert "Traceback" not in done.stderr
