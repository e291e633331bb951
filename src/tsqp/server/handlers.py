"""From an exception to what a client is told. A class decides; the text of what nobody expected is never shown."""

from __future__ import annotations

import logging
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from tsqp.errors import (
    ChannelClosed,
    ChannelError,
    CheckFailed,
    InputError,
    NumericError,
    PadsExhausted,
    QueueFull,
    UnsupportedModel,
)
from tsqp.server.discreet import about, told
from tsqp.server.errors import ApiError, too_few_pads

_log = logging.getLogger("tsqp.server")

_CLIENT_LEFT = 499  # nobody reads it

# Options of the package by the names that they have in the API.
_API_NAMES = {
    "structured_outputs": "response_format",
    "logprobs": "top_logprobs",
}


def translated(error: Exception) -> ApiError:
    """What a client is told. What is the server's own fault is in the log too: the request, the class and the place."""
    match error:
        case ApiError():
            return error
        case HTTPException():
            return _of_status(error.status_code)
        case ClientDisconnect():
            return ApiError(_CLIENT_LEFT, "the client has left")
        case QueueFull():
            return ApiError(
                429, "too many requests wait already", kind="rate_limit_error", code="queue_full", retry_after_s=1
            )
        case PadsExhausted():
            text = "not enough one-time pads are ready: ask again when more were made"
            return _unavailable(text, "pads_exhausted", retry_after_s=2)
        case CheckFailed():
            return _unavailable("the worker failed a check: nothing was made of its answer", "check_failed")
        case ChannelClosed():
            return _unavailable("the server is shutting down, or has lost its worker", "unavailable", retry_after_s=2)
        case ChannelError():
            return _unavailable("the worker cannot be reached", "worker_lost", retry_after_s=2)
        case InputError() if "compute.kv_memory" in error.fields:
            text = "prompt and answer need more memory than this server has for one: ask for fewer tokens"
            return ApiError(400, text, param="max_tokens", code="context_length_exceeded")
        case InputError() if "guard.pads_empty" in error.fields:
            return too_few_pads()
        case InputError() | UnsupportedModel():
            fields = [_API_NAMES.get(name, name) for name in error.fields]
            text = error.explained(lambda name: _API_NAMES.get(name, name))
            return ApiError(400, text, param=fields[0] if fields else None)
    _log.error("a request failed: %s", told(error), extra=about("request_failed", error, 500))
    if isinstance(error, NumericError):
        return ApiError(500, "the model computed numbers that are none", kind="server_error", code="numeric_error")
    text = "the server has failed; its log says why, under the id in the header x-tsqp-request-id"
    return ApiError(500, text, kind="server_error", code="internal_error")


def answered(error: Exception) -> Response:
    """The whole answer to a request that failed before it had one."""
    response = translated(error).response()
    if isinstance(error, HTTPException) and error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        response.headers["allow"] = (error.headers or {}).get("Allow", "")
    return response


def _of_status(status: int) -> ApiError:
    """An error of the framework, by its number alone: its text may repeat a path."""
    match status:
        case HTTPStatus.NOT_FOUND:
            return ApiError(404, "there is no such path: those of the API begin with /v1", code="unknown_url")
        case HTTPStatus.METHOD_NOT_ALLOWED:
            return ApiError(405, "this path does not take this method", code="method_not_allowed")
        case _:
            known = status in HTTPStatus._value2member_map_
            text = HTTPStatus(status).phrase.lower() if known else "the request failed"
            return ApiError(status, text, kind="invalid_request_error" if status < 500 else "server_error")


def _unavailable(text: str, code: str, retry_after_s: float | None = None) -> ApiError:
    return ApiError(503, text, kind="server_error", code=code, retry_after_s=retry_after_s)
