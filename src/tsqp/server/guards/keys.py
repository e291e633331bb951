"""Who sends a request: the tenant of its API key."""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tsqp.server.api_keys import KeyFile
from tsqp.server.errors import ApiError


class Keys:
    """Sets ``request.state.tenant``: the name of the API key, ``""`` where the server has none.

    ``open_paths`` need no key, and have the tenant ``""``.
    """

    def __init__(self, app: ASGIApp, keys: KeyFile | None, open_paths: Collection[str]) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tenant: str | None = ""
        if self._keys is not None and scope["path"] not in self._open_paths:
            kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            tenant = self._keys.tenant_of(key.strip()) if kind.lower() == "bearer" else None
        if tenant is None:
            raise ApiError(401, "give a valid API key, as Authorization: Bearer KEY", code="invalid_api_key")
        scope.setdefault("state", {})["tenant"] = tenant
        await self._app(scope, receive, send)
