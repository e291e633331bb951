"""All guards around one application, in their order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from tsqp.server.api_keys import KeyFile
from tsqp.server.guards.affinity import HEADER as AFFINITY
from tsqp.server.guards.affinity import Affinity
from tsqp.server.guards.faults import Faults
from tsqp.server.guards.headers import AnswerHeaders
from tsqp.server.guards.hosts import Hosts, Origins, is_wildcard, names_for
from tsqp.server.guards.keys import Keys
from tsqp.server.guards.limits import AtOnce, Bodies, Doors, HeaderCount
from tsqp.server.health import OPEN_PATHS
from tsqp.server.lifecycle import Lifecycle
from tsqp.server.settings import ServerSettings

# What pages may read of an answer, beside its body.
SHOWN = (
    "x-request-id",
    "x-tsqp-request-id",
    "x-tsqp-protection",
    "x-tsqp-ignored",
    "x-tsqp-receipt",
    AFFINITY,
    "retry-after",
    "x-should-retry",
)


def guarded(
    app: ASGIApp,
    settings: ServerSettings,
    *,
    lifecycle: Lifecycle,
    keys: KeyFile | None = None,
    always: Mapping[str, str],
    answered: Callable[[int], None] = lambda _status: None,
    pages: Collection[str] = (),
) -> ASGIApp:
    """The application behind its guards; ``always`` are headers of every answer, ``answered`` is told each status.

    ``pages``: paths that need no key, since there is nothing in them.

    A request passes them from the last line of this function to the first. Cheap refusals come first: who has no key
    gets no body read, and a page of a stranger is not told whether its key is right.
    """
    app = Affinity(app)
    app = Bodies(app, settings.max_body_bytes, settings.body_s)
    app = AtOnce(app, settings.max_requests_per_key, {*OPEN_PATHS, *pages})
    app = Keys(app, keys, {*OPEN_PATHS, *pages})
    app = Doors(app, lifecycle, OPEN_PATHS)
    app = Faults(app)
    if settings.origins:
        # Outside of ``Faults``, so that a page may read why it was refused. It answers what browsers ask beforehand.
        app = CORSMiddleware(
            app,
            allow_origins=settings.origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=SHOWN,
        )
    app = Origins(app, settings.origins)
    app = Hosts(app, names_for(settings.host, settings.hosts), any_number=is_wildcard(settings.host))
    app = HeaderCount(app, settings.max_headers)
    app = Faults(app)
    app = AnswerHeaders(app, always, answered)
    return _OnlyHttp(app)


class _OnlyHttp:
    """There are no web sockets here, and nothing to do when a server starts or ends."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._app(scope, receive, send)
