"""``tsqp proxy`` as a process: a server that is verified, and each reason to end at once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.client.evidence_server import evidence_server, honest
from tests.commands import LIMIT_S, Home, Result
from tests.tee.certificates import key_pair
from tests.tee.policies import policy_text

Command = Callable[..., Result]
PAIR = key_pair()


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(policy_text(["none"]))
    return path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_told_to_end(number: signal.Signals, home: Home, policy: Path, tmp_path: Path) -> None:
    with evidence_server(PAIR, honest(PAIR), tmp_path) as address:
        command = [sys.executable, "-m", "tsqp", "proxy", "--server", address, "--policy", str(policy), "--port", "0"]
        pipe = subprocess.PIPE
        with subprocess.Popen(
            [*command, "--json"], stdout=pipe, stderr=pipe, env=home.environment, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            ready = json.loads(process.stdout.readline())
            with urllib.request.urlopen(ready["address"].removesuffix("/v1") + "/status", timeout=LIMIT_S) as answer:
                state = json.load(answer)
            process.send_signal(number)
            assert process.wait(LIMIT_S) == 0
            assert (state["verified"], state["server"]) == (True, address)
            said = process.stderr.read()
    key = state["keys"][0]["key"][:16]
    assert said.splitlines() == [
        f"tsqp proxy: verified: {address}: no TEE, as the policy allows; protection masked, key {key}"
    ]


def test_a_server_that_is_refused_ends_it(tsqp: Command, policy: Path, tmp_path: Path) -> None:
    with evidence_server(key_pair(), honest(PAIR), tmp_path) as address:
        result = tsqp("proxy", "--server", address, "--policy", policy, "--port", 0)
    assert (result.code, result.out) == (1, "")
    assert "refused: certificate-sha256 is " in result.error


def test_nobody_there_ends_it(tsqp: Command, policy: Path) -> None:
    result = tsqp("proxy", "--server", "https://127.0.0.1:1", "--policy", policy, "--port", 0)
    assert result.code == 1
    assert "no evidence from https://127.0.0.1:1" in result.error


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"--server": "http://127.0.0.1"}, "give https://host:port"),
        ({"--policy": "missing.toml"}, "nothing is sent without one"),
        ({"--collateral": "missing"}, "missing is no directory"),
        ({"--port": "70000"}, "--port must be 0 to 65535"),
        ({"--max-age": "0"}, "--max-age must be more than 0 s"),
    ],
)
def test_wrong_use_is_one_line(changes: dict[str, str], told: str, tsqp: Command, policy: Path) -> None:
    options = {"--server": "https://127.0.0.1:1", "--policy": str(policy), **changes}
    result = tsqp("proxy", *(word for pair in options.items() for word in pair))
    assert result.code == 2
    assert told in result.error
