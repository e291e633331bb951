"""A word that clients send in every place is nowhere but in the answers to those who sent it."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.commands import LIMIT_S, Home
from tests.families import tiny_model
from tests.server.process import serving
from tsqp.server.api_keys import add_line, line_for, new_key
from tsqp.server.guards.affinity import HEADER as AFFINITY
from tsqp.server.json_log import Line

CANARY = "xylophone7f3a"
COMPLETION: dict[str, Any] = {"model": "llama", "prompt": f"{CANARY} fox", "max_tokens": 4}
CHAT: dict[str, Any] = {"model": "llama", "messages": [{"role": "user", "content": CANARY}], "max_tokens": 4}
SCHEMA = {"type": "json_schema", "json_schema": {"name": CANARY, "schema": {"type": CANARY}}}
GOOD = [COMPLETION, {**COMPLETION, "stop": [CANARY]}, {**COMPLETION, "user": CANARY, "stream": True}]
BAD: list[tuple[str, Any]] = [
    ("/v1/completions", {**COMPLETION, "model": CANARY}),
    ("/v1/completions", {**COMPLETION, "temperature": CANARY}),
    ("/v1/completions", {**COMPLETION, "max_tokens": -1}),
    ("/v1/completions", {**COMPLETION, "prompt": {CANARY: 1}}),
    ("/v1/completions", {**COMPLETION, "prompt": CANARY * 5000}),
    ("/v1/chat/completions", {**CHAT, "response_format": SCHEMA}),
    ("/v1/chat/completions", CHAT),  # this model has no chat template
    ("/v1/chat/completions", {**CHAT, "tools": [{"type": "function", "function": {"name": CANARY}}]}),
    ("/v1/completions", f'{{"prompt": "{CANARY}'),
    ("/v1/completions", f'"{CANARY}"'),
    ("/v1/completions", f"{CANARY}\xff"),
    ("/v1/completions", json.dumps(COMPLETION).replace("4", "NaN")),
    (f"/{CANARY}", COMPLETION),
    (f"/v1/completions/../{CANARY}?{CANARY}={CANARY}", {}),
]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["text", "json"])
def test_the_canary_is_in_no_log_metric_or_error(home: Home, tmp_path: Path, form: str) -> None:
    key = new_key()
    add_line(tmp_path / "keys", line_for(f"tenant-{CANARY}", key))
    model = ("--model", tiny_model("llama").directory, "--served-model-name", "llama")
    options = (*model, "--protection", "verified", "--log-format", form)
    with serving(home, *options, "--port", 0, "--metrics-port", 0, "--api-keys", tmp_path / "keys") as server:
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        with httpx.Client(base_url=server.address, headers=headers, timeout=LIMIT_S) as client:
            for body in GOOD:
                answer = client.post("/v1/completions", json=body, headers={"x-request-id": CANARY, AFFINITY: CANARY})
                assert answer.status_code == 200, answer.text
                assert answer.headers[AFFINITY] == CANARY
            for path, wrong in BAD:
                content = wrong.encode("latin-1") if isinstance(wrong, str) else json.dumps(wrong).encode()
                answer = client.post(path, content=content)
                assert answer.status_code >= 400, (path, wrong)
                assert CANARY not in answer.text, (path, wrong)
                assert len(answer.content) <= 4096
            with client.stream("POST", "/v1/completions", json={**COMPLETION, "max_tokens": 200, "stream": True}):
                pass  # left in the middle
            for refused in ({"authorization": f"Bearer {CANARY}"}, {"host": CANARY}, {"origin": f"http://{CANARY}"}):
                answer = client.post("/v1/completions", json=COMPLETION, headers=refused)
                assert answer.status_code in (401, 403, 421)
                assert CANARY not in answer.text
            assert CANARY not in client.get("/readyz").text
        raw(server.address, f"{CANARY}\r\n\r\n")
        raw(server.address, f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n{CANARY}: {CANARY * 5000}")
        assert server.metrics_address is not None
        metrics = httpx.get(server.metrics_address).text
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() == 0
        assert server.process.stdout is not None
        printed = server.process.stdout.read().decode()
    written = "".join(server.log)
    assert "ending:" in written  # it is the log
    for word in (CANARY, key, key.removeprefix("tsqp-")):
        assert word not in written + metrics + printed
    assert "/v1/completions" not in written
    if form == "json":
        check_lines(server.log)
    assert home.leftovers() == []


def check_lines(log: list[str]) -> None:
    """The whole of standard error is objects, one a line, also what is said of the start."""
    lines = [json.loads(line) for line in log]
    events = [line["event"] for line in lines]
    assert {"starting", "ready", "draining"} <= set(events)
    assert events.index("starting") < events.index("ready") < events.index("draining")
    assert {name for line in lines for name in line} <= set(Line.__struct_fields__)


def raw(address: str, text: str) -> None:
    """Bytes that are no HTTP; the answer has none of them."""
    host, _, port = address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), LIMIT_S) as connection:
        connection.sendall(text.encode())
        answer = connection.recv(65536).decode()
    assert answer.startswith("HTTP/1.1 4")
    assert CANARY not in answer
