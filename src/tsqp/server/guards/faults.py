"""Whatever an endpoint or a guard raises becomes an answer, or the end of the connection; nothing of it is shown."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tsqp.server.handlers import answered


class AnswerCutShort(Exception):
    """An answer that had begun cannot be finished: the connection ends without the end of the answer."""


class Faults:
    """The one place where an exception becomes an answer; what nobody expected is one line in the log."""

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
        except AnswerCutShort:  # of another of these, further in
            raise
        except Exception as error:
            answer = answered(error)
            if complete:
                return  # the client has all of it
            if begun:
                raise AnswerCutShort from None
            await answer(scope, receive, send)


async def _raise_again(_request: Request, error: Exception) -> Response:
    raise error


# For Starlette, which has answers of its own to these: they are left to ``Faults``, as all others are.
exception_handlers: Mapping[int | type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
    HTTPException: _raise_again,
    Exception: _raise_again,
}
