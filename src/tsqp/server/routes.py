"""The paths of the API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from tsqp.server import chat, completions, models, responses, tokens
from tsqp.server.console import about, answer
from tsqp.server.console.pages import show
from tsqp.server.handlers import answered
from tsqp.server.service import Service

Endpoint = Callable[[Service, Request], Awaitable[Response]]

PROTECTION = "x-tsqp-protection"
IGNORED = "x-tsqp-ignored"

_CLIENT_LEFT = 499  # nobody reads it


def routes(service: Service) -> list[Route]:
    """All of them."""

    def route(method: str, path: str, endpoint: Endpoint) -> Route:
        return Route(path, _answering(service, endpoint), methods=[method])

    console = (
        []
        if service.console is None
        else [
            *(route("GET", path, show) for path in service.console.pages),
            route("GET", "/console/about", about.about),
            route("POST", "/console/answer", answer.create),
        ]
    )
    return [
        *console,
        route("POST", "/v1/chat/completions", chat.create),
        route("POST", "/v1/completions", completions.create),
        route("POST", "/v1/responses", responses.create),
        route("GET", "/v1/models", models.list_all),
        route("GET", "/v1/models/{name:path}", models.show),
        route("POST", "/tokenize", tokens.tokenize),
        route("POST", "/detokenize", tokens.detokenize),
    ]


def _answering(service: Service, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint with errors as answers, and with the headers that each answer has."""

    async def answer(request: Request) -> Response:
        try:
            response = await endpoint(service, request)
        except ClientDisconnect:
            response = Response(status_code=_CLIENT_LEFT)
        except Exception as error:
            response = answered(error)
        response.headers[PROTECTION] = service.protection
        ignored = getattr(request.state, "ignored", ())
        if ignored:
            response.headers[IGNORED] = ", ".join(ignored)
        return response

    return answer
