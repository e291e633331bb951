"""``x-tsqp-affinity``: a value without meaning by which a balancer keeps a conversation at one server.

Covers: the value is the client's or random, never made from a text, a key or a tenant, and what is malformed is not
repeated (tests/server/guards/test_affinity.py). Does not cover: what a balancer does with it, docs/server.md section 9.
"""

from __future__ import annotations

import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-tsqp-affinity"
PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses"})  # whose prefixes are kept
FRESH_BYTES = 16
_CLEAN = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Affinity:
    """Gives each answer of ``PATHS`` the client's value where it is well formed and there once; else a fresh one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in PATHS:
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).getlist(HEADER)
        clean = len(given) == 1 and _CLEAN.fullmatch(given[0]) is not None
        value = given[0] if clean else secrets.token_hex(FRESH_BYTES)

        async def send_with_value(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = value
            await send(message)

        await self._app(scope, receive, send_with_value)
