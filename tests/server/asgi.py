"""Asks an ASGI application without a server; small applications to put behind a guard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import httpx
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.commands import LIMIT_S
from tsqp.server.under_way import request_under_way

HOST = "http://localhost"


def ask(
    app: ASGIApp,
    path: str = "/",
    *,
    method: str = "GET",
    headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    content: bytes | AsyncIterator[bytes] | None = None,
    host: str = HOST,
) -> httpx.Response:
    """One request, from its first byte to the last of its answer."""

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=host) as client:
            return await client.request(method, path, headers=headers, content=content)

    return asyncio.run(asyncio.wait_for(send(), LIMIT_S))


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The ``error`` object; fails where an answer is none of ours."""
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert len(answer.content) <= 4096
    return body["error"]


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the body and answers with it, and with the tenant and the id of the request."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    current = request_under_way()
    number = None if current is None else current.request_id
    found = {"tenant": scope.get("state", {}).get("tenant"), "request_id": number}
    told = [(f"x-{name}".encode(), str(value).encode()) for name, value in found.items()]
    size = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [size, *told]})
    await send({"type": "http.response.body", "body": body})
