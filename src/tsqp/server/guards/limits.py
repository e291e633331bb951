"""Bounds of what one request may be, and of how many may be under way. Bounds of connections: ``connection.py``."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tsqp.server.errors import ApiError
from tsqp.server.lifecycle import Lifecycle


class HeaderCount:
    """At most ``most`` headers. Their size is bounded where they are read."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if len(scope["headers"]) > self._most:
            raise ApiError(431, f"the request has more than {self._most} headers", code="too_many_headers")
        await self._app(scope, receive, send)


class Bodies:
    """A body is at most ``most`` bytes, and is there within ``within_s`` seconds of its headers."""

    def __init__(self, app: ASGIApp, most: int, within_s: float) -> None:
        self._app = app
        self._most = most
        self._within_s = within_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced[:20]) > self._most:
            raise self._too_large()
        deadline = asyncio.get_running_loop().time() + self._within_s
        arrived, whole = 0, False

        async def receive_in_bounds() -> Message:
            nonlocal arrived, whole
            if whole:
                return await receive()  # from now on the one thing to hear is that the client has left
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408, f"the request did not arrive within {self._within_s:g} s", code="request_timeout"
                ) from None
            arrived += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if arrived > self._most:
                raise self._too_large()
            return message

        await self._app(scope, receive_in_bounds, send)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request has more than {self._most} bytes", code="request_too_large")


class AtOnce:
    """At most ``most`` requests of one tenant are under way; None for no bound. ``open_paths`` do not count."""

    def __init__(self, app: ASGIApp, most: int | None, open_paths: Collection[str] = ()) -> None:
        self._app = app
        self._most = most
        self._open_paths = frozenset(open_paths)
        self._under_way = Counter[str]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._most is None or scope["path"] in self._open_paths:
            return await self._app(scope, receive, send)
        tenant = scope["state"]["tenant"]
        if self._under_way[tenant] >= self._most:
            raise ApiError(
                429,
                f"{self._most} requests of this API key are under way: wait for one to end",
                kind="rate_limit_error",
                code="too_many_requests",
                retry_after_s=1.0,
            )
        self._under_way[tenant] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._under_way[tenant] -= 1
            if not self._under_way[tenant]:
                del self._under_way[tenant]  # nothing is kept of who is not here


class Doors:
    """Takes nothing new once the server drains, but for ``open_paths``."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle, open_paths: Collection[str]) -> None:
        self._app = app
        self._lifecycle = lifecycle
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._lifecycle.draining and scope["path"] not in self._open_paths:
            raise ApiError(
                503, "the server is shutting down", kind="server_error", code="shutting_down", retry_after_s=5.0
            )
        await self._app(scope, receive, send)
