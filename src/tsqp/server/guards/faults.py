"""Whatever an endpoint or a guard raises becomes an answer, or the end of the connection; nothing of it is shown."""

from __future__ import annotations

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tsqp.server.discreet import about, told
from tsqp.server.errors import ApiError

log = logging.getLogger("tsqp.server")


class AnswerCutShort(Exception):
    """An answer that had begun cannot be finished: the connection ends without the end of the answer."""


class Faults:
    """``ApiError`` becomes its answer, anything else 500 with a constant text, and one line in the log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = complete = False

        async def send_and_note(message: Message) -> None:
            nonlocal begun, complete
            begun = begun or message["type"] == "http.response.start"
            complete = complete or (message["type"] == "http.response.body" and not message.get("more_body", False))
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception as error:
            if complete:
                return  # Starlette raises again what it has answered
            answer = error if isinstance(error, ApiError) else _unexpected(error)
            if begun:
                raise AnswerCutShort from None
            await answer.response()(scope, receive, send)


def _unexpected(error: Exception) -> ApiError:
    log.error("a request failed: %s", told(error), extra=about("request_failed", error, 500))
    return ApiError(500, "something went wrong in the server", kind="server_error", code="internal_error")
