"""Which names the server answers to, and which pages may use it."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tsqp.server.errors import ApiError

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def host_of(authority: str) -> str:
    """The host in ``host``, ``host:port``, ``v6``, ``[v6]`` or ``[v6]:port``.

    In lower case, without a last dot; a number as it is written shortest.
    """
    text = authority.strip().lower()
    if text.startswith("["):
        return _shortest(text[1:].partition("]")[0])
    if _is_number(text):
        return _shortest(text)
    host, colon, port = text.rpartition(":")
    return (host if colon and port.isdigit() else text).removesuffix(".")


def names_for(host: str, more: Iterable[str] = ()) -> frozenset[str]:
    """Names for a server that listens on ``host``: loopback, that host, and ``more``."""
    return LOOPBACK_NAMES | {host_of(host)} | {host_of(name) for name in more}


def is_wildcard(host: str) -> bool:
    """Whether listening on ``host`` is listening on every address of the machine."""
    return host in ("", "0.0.0.0", "::")  # noqa: S104


class Hosts:
    """Refuses a request whose ``Host`` is none of ``names``.

    Against DNS rebinding: a page of any site may make its own name point to this server, and the browser then counts
    the server as part of that site; but it sends that name. A number cannot be pointed elsewhere, so ``any_number``,
    for a server that listens on all addresses, allows those.
    """

    def __init__(self, app: ASGIApp, names: Collection[str], *, any_number: bool = False) -> None:
        self._app = app
        self._names = frozenset(names)
        self._any_number = any_number

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).getlist("host")
        host = host_of(given[0]) if len(given) == 1 else ""
        if host not in self._names and not (self._any_number and _is_number(host)):
            text = (
                "this server does not answer to the host name of the request: its operator may allow it (--allow-host)"
            )
            raise ApiError(421, text, code="host_not_allowed")
        await self._app(scope, receive, send)


class Origins:
    """Refuses what a page of another origin sends, unless it is one of ``allowed``.

    Browsers send simple requests before they ask whether they may: without this check any page could make the server
    compute, although the page could not read the answer. Programs that are no browsers send no ``Origin``.
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str]) -> None:
        self._app = app
        self._allowed = frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        own = f"{scope['scheme']}://{headers.get('host', '')}".lower()
        if origin is not None and origin not in self._allowed and origin.lower() != own:
            raise ApiError(403, "this server does not take requests of that origin", code="origin_not_allowed")
        await self._app(scope, receive, send)


def _shortest(host: str) -> str:
    return str(ipaddress.ip_address(host)) if _is_number(host) else host


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
