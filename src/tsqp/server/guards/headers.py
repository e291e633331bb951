"""Headers of every answer, and the id of a request."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tsqp.server.under_way import begin_request

SECURITY = {
    "x-content-type-options": "nosniff",  # an answer is never taken for a page or a script
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
}
_CLEAN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class AnswerHeaders:
    """Gives each request an id of our own, in ``request_under_way``, and each answer ``always`` and its ids.

    ``request.state.ignored``, set by whoever reads the body, becomes the header ``x-tsqp-ignored``.

    ``x-tsqp-request-id`` is ours. ``x-request-id`` is the client's, where that is short and clean; ours otherwise.
    Nothing here looks a client's id up, so two requests may have the same. A header that an endpoint sets stays.
    ``answered`` is called with the status of each answer.
    """

    def __init__(
        self, app: ASGIApp, always: Mapping[str, str], answered: Callable[[int], None] = lambda _status: None
    ) -> None:
        self._app = app
        self._always = {**SECURITY, **always}
        self._answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ours = f"req_{secrets.token_hex(16)}"
        state = scope.setdefault("state", {})
        begin_request(ours)
        theirs = Headers(scope=scope).get("x-request-id", "")
        shown = theirs if _CLEAN_ID.fullmatch(theirs) else ours

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._answered(message["status"])
                headers = MutableHeaders(scope=message)
                for name, value in {**self._always, "x-request-id": shown, "x-tsqp-request-id": ours}.items():
                    headers.setdefault(name, value)
                if state.get("ignored"):
                    headers["x-tsqp-ignored"] = ", ".join(state["ignored"])
            await send(message)

        await self._app(scope, receive, send_with_headers)
