"""All guards together: their order, and what every answer has whoever gives it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.server.asgi import ask, echo, error_of
from tsqp.server.api_keys import KeyFile, add_line, line_for, new_key
from tsqp.server.guards.affinity import HEADER as AFFINITY
from tsqp.server.guards.chain import guarded
from tsqp.server.lifecycle import Lifecycle
from tsqp.server.settings import ServerSettings

ORIGIN = "https://app.example"
SETTINGS = ServerSettings(max_body_bytes=100, max_headers=20, origins=(ORIGIN,))


def chain(app: ASGIApp = echo, settings: ServerSettings = SETTINGS, keys: KeyFile | None = None) -> ASGIApp:
    return guarded(app, settings, lifecycle=Lifecycle(), keys=keys, always={"x-tsqp-protection": "masked"})


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    add_line(tmp_path / "keys", line_for("alice", new_key()))
    return KeyFile(tmp_path / "keys")


async def unread() -> AsyncIterator[bytes]:
    raise AssertionError
    yield b""


async def fails(scope: Scope, receive: Receive, send: Send) -> None:
    raise ValueError


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", {}, 401),
        ("/", {"host": "evil.example"}, 421),
        ("/", {"origin": "https://evil.example"}, 403),
        ("/", {f"x-{i}": "1" for i in range(30)}, 431),
        ("/livez", {"content-length": "101"}, 413),
    ],
)
def test_a_refusal_has_all_headers_and_reads_no_body(
    keys: KeyFile, path: str, headers: dict[str, str], status: int
) -> None:
    answer = ask(chain(keys=keys), path, method="POST", headers=headers, content=unread())
    assert answer.status_code == status
    error_of(answer)
    assert answer.headers["x-tsqp-protection"] == "masked"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-tsqp-request-id"].startswith("req_")


def test_a_failure_has_them_too() -> None:
    answer = ask(chain(fails))
    assert (answer.status_code, answer.headers["x-tsqp-protection"]) == (500, "masked")


def test_a_page_that_is_allowed_is_asked_and_answered_without_credentials(keys: KeyFile) -> None:
    """The browser asks first, without the key; then it sends the key that the page has."""
    wants = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}
    asked = ask(chain(keys=keys), method="OPTIONS", headers={"origin": ORIGIN, **wants})
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == ORIGIN
    assert "x-stainless-os" in asked.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in asked.headers
    refused = ask(chain(keys=keys), method="POST", headers={"origin": ORIGIN})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)


def test_a_page_that_is_allowed_may_read_what_keeps_a_conversation_together() -> None:
    answer = ask(chain(), "/v1/completions", method="POST", headers={"origin": ORIGIN, AFFINITY: "mine"})
    assert answer.headers[AFFINITY] == "mine"
    assert AFFINITY in answer.headers["access-control-expose-headers"]


def test_by_default_no_page_of_another_origin_is_answered() -> None:
    app = chain(settings=ServerSettings())
    for method in ("OPTIONS", "POST", "GET"):
        answer = ask(app, method=method, headers={"origin": ORIGIN, "access-control-request-method": "POST"})
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


def test_the_endpoint_hears_that_its_client_has_left() -> None:
    """Through all guards: what is in between must not keep it to itself."""
    heard: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        heard.append(await receive())

    async def run() -> None:
        sent: list[Message] = [{"type": "http.request", "body": b"{}", "more_body": False}, {"type": "http.disconnect"}]
        messages = iter(sent)

        async def receive() -> Message:
            return next(messages)

        async def send(message: Message) -> None: ...

        headers = [(b"host", b"localhost")]
        scope = {"type": "http", "method": "POST", "path": "/", "scheme": "http", "headers": headers}
        await chain(app)(scope, receive, send)

    asyncio.run(run())
    assert [message["type"] for message in heard] == ["http.disconnect"]


def test_the_bounds_of_a_server_hold_behind_its_keys(keys: KeyFile) -> None:
    """A request that asks again before it is answered is one too many; while the server drains, none is taken."""
    lifecycle = Lifecycle()
    settings = ServerSettings(max_requests_per_key=1)
    again: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def note(message: Message) -> None:
            if message["type"] == "http.response.start":
                again.append(message["status"])

        await whole({**scope, "state": {}}, receive, note)
        await echo(scope, receive, send)

    whole = guarded(app, settings, lifecycle=lifecycle, always={})
    assert ask(whole).status_code == 200
    assert again == [429]
    lifecycle.draining = True
    assert ask(whole).status_code == 503
    assert ask(guarded(echo, settings, lifecycle=lifecycle, keys=keys, always={}), "/readyz").status_code == 200


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
def test_only_http_is_answered(kind: str) -> None:
    async def nothing(*_: object) -> Message:
        raise AssertionError

    asyncio.run(chain()({"type": kind}, nothing, nothing))  # type: ignore[arg-type]
