"""What a client is told when something goes wrong: OpenAI's shape, bounded, and never with the client's own text."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

import msgspec
from starlette.responses import Response

MAX_MESSAGE = 600  # characters, of at most 6 bytes in JSON: an error has at most 4 KB


class ErrorBody(msgspec.Struct, frozen=True):
    """The ``error`` object: the four fields that clients read."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(msgspec.Struct, frozen=True):
    """The body of an error."""

    error: ErrorBody


class ApiError(Exception):
    """Ends a request with ``status`` and an ``ErrorBody``.

    ``retry_after_s`` tells a client when to ask again; without it, clients are told not to repeat what cannot succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(message[:MAX_MESSAGE], kind, param, code)
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> Mapping[str, str]:
        """What goes with the body, beside its type and length."""
        if self.retry_after_s is not None:
            return {"retry-after": str(max(1, round(self.retry_after_s))), "x-should-retry": "true"}
        wanted = {"www-authenticate": "Bearer"} if self.status == HTTPStatus.UNAUTHORIZED else {}
        return {"x-should-retry": "false", **wanted}

    def encode(self) -> bytes:
        """The body: ``{"error": {...}}``, also the data of an event that ends a stream."""
        return msgspec.json.encode(ErrorReply(self.body))

    def response(self) -> Response:
        """The whole answer."""
        return Response(self.encode(), self.status, self.headers, "application/json")


def too_few_pads() -> ApiError:
    """A request to which the pads that a server keeps can never be promised."""
    text = "prompt and answer need more one-time pads than this server keeps: ask for fewer tokens, or fewer answers"
    return ApiError(400, text, param="max_tokens", code="context_length_exceeded")
