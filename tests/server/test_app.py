"""Endpoints behind their guards: tenants come from keys, errors have one shape, clients may leave at any time."""

from __future__ import annotations

import asyncio
import gc
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp, Message

from tests.server.asgi import ask, error_of
from tests.server.conftest import Served
from tests.server.serving import Script, service_of
from tsqp.server.api_keys import KeyFile, add_line, line_for, new_key
from tsqp.server.app import create_app
from tsqp.server.health import Problem

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
JSON = {"content-type": "application/json"}
MANY = 2_000


class Fine:
    async def problem(self) -> Problem | None:
        return None


def test_the_tenant_of_a_request_is_the_name_of_its_key(tmp_path: Path) -> None:
    keys = {name: new_key() for name in ("alice", "bob")}
    for name, key in keys.items():
        add_line(tmp_path / "keys", line_for(name, key))
    script = Script("Hi.")
    app = create_app(service_of(script), keys=KeyFile(tmp_path / "keys"), probe=Fine())
    for key in keys.values():
        headers = {**JSON, "authorization": f"Bearer {key}"}
        answer = ask(app, "/v1/chat/completions", method="POST", headers=headers, content=json.dumps(BODY).encode())
        assert answer.status_code == 200
        assert answer.headers["x-tsqp-protection"] == "local"
    assert [opened.tenant for opened in script.opened] == ["alice", "bob"]
    assert ask(app, "/v1/models").status_code == 401
    assert ask(app, "/readyz").json() == {"status": "ready"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/livez", 405), ("GET", "/metrics", 404)],
)
def test_what_is_not_there_has_the_one_shape(method: str, path: str, status: int) -> None:
    answer = ask(create_app(service_of(Script("Hi.")), probe=Fine()), path, method=method)
    assert answer.status_code == status
    error_of(answer)


def test_an_error_that_nobody_expected_has_it_too() -> None:
    app = create_app(service_of(Script(ValueError("canary"))), probe=Fine())
    answer = ask(app, "/v1/chat/completions", method="POST", headers=JSON, content=json.dumps(BODY).encode())
    assert answer.status_code == 500
    assert "canary" not in str(error_of(answer))


async def visit(app: ASGIApp, messages: Iterable[Message], leave_after: int | None = None) -> list[Message]:
    """One request of these messages. The client leaves when they are at an end, or after so many of the answer."""
    sent: list[Message] = []
    left = asyncio.Event()
    coming = iter(messages)

    async def receive() -> Message:
        message = next(coming, None)
        if message is None:
            await left.wait()
        return message or {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)
        if len(sent) == leave_after:
            left.set()

    if leave_after is None:
        left.set()
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope: dict[str, Any] = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"",
        "query_string": b"",
        "scheme": "http",
        "headers": headers,
        "client": None,
        "server": None,
    }
    await app(scope, receive, send)
    return sent


def test_a_client_that_leaves_while_it_sends_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(service_of(Script("Hi.")), probe=Fine())
    begun = {"type": "http.request", "body": b'{"model"', "more_body": True}
    asyncio.run(visit(app, [begun]))
    assert not caplog.records


def anonymous_kib() -> int:
    gc.collect()
    return int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0])


@pytest.mark.slow
def test_thousands_of_aborted_requests_leave_nothing(server: Served) -> None:
    app = create_app(server.service, probe=Fine())
    body = json.dumps({**BODY, "max_tokens": 500, "stream": True}).encode()
    whole = {"type": "http.request", "body": body, "more_body": False}

    async def aborted(count: int) -> int:
        for _ in range(count // 10):
            await asyncio.gather(*(visit(app, [whole], leave_after=2 + i % 3) for i in range(10)))
        while server.model.counts().running or server.model.counts().waiting:
            await asyncio.sleep(0.001)
        return anonymous_kib()

    async def run() -> None:
        settled = await aborted(MANY // 5)
        ended = dict(server.model.counts().ended)
        grown = await aborted(MANY - MANY // 5) - settled
        assert grown < 3 << 10  # KiB: two for each, where a leak of a request's state would be tens
        counts = server.model.counts()
        assert counts.ended["abort"] - ended["abort"] > MANY // 2
        assert counts.added == sum(counts.ended.values())
        assert counts.kv_bytes == 0
        kept = len(server.model.llm.engine._books.scheduler._prefixes)
        assert kept <= 1 + counts.ended["stop"] + counts.ended["length"]  # those that were given up have one prompt

    asyncio.run(run())
