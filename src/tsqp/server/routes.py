"""The paths of the API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tsqp.server import chat, completions, models, responses, tokens
from tsqp.server.service import Service
from tsqp.server.under_way import found_endpoint

Endpoint = Callable[[Service, Request], Awaitable[Response]]


def routes(service: Service) -> list[Route]:
    """All of them. What an endpoint raises is for ``guards/faults.py``."""

    def route(method: str, path: str, endpoint: Endpoint) -> Route:
        return Route(path, _found(path, partial(endpoint, service)), methods=[method])

    return [
        route("POST", "/v1/chat/completions", chat.create),
        route("POST", "/v1/completions", completions.create),
        route("POST", "/v1/responses", responses.create),
        route("GET", "/v1/models", models.list_all),
        route("GET", "/v1/models/{name:path}", models.show),
        route("POST", "/tokenize", tokens.tokenize),
        route("POST", "/detokenize", tokens.detokenize),
    ]


def _found(path: str, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint, which the log knows by the path of its route."""

    async def answer(request: Request) -> Response:
        found_endpoint(path)
        return await endpoint(request)

    return answer
