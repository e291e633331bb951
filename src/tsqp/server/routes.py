"""The paths of the API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tsqp.server import (
    attestation,
    chat,
    chat_types,
    completions,
    completions_types,
    models,
    responses,
    responses_types,
    tokens,
)
from tsqp.server.console import about, answer
from tsqp.server.console.pages import show
from tsqp.server.openapi import Operation, documented_by
from tsqp.server.service import Service
from tsqp.server.under_way import found_endpoint
from tsqp.tee.evidence import Evidence
from tsqp.tee.statement import NONCE_BYTES

OPERATIONS = (
    Operation(
        "POST",
        "/v1/chat/completions",
        chat.create,
        "Answer a conversation.",
        chat_types.Completion,
        chat_types.ChatBody,
        chat_types.Chunk,
    ),
    Operation(
        "POST",
        "/v1/completions",
        completions.create,
        "Go on with texts or tokens.",
        completions_types.Completion,
        completions_types.CompletionBody,
        completions_types.Completion,
    ),
    Operation(
        "POST",
        "/v1/responses",
        responses.create,
        "Answer a conversation of items; nothing is stored.",
        responses_types.Response,
        responses_types.ResponsesBody,
        responses_types.ResponseEvent,
    ),
    Operation("GET", "/v1/models", models.list_all, "The names of the model.", models.Models),
    Operation("GET", "/v1/models/{name:path}", models.show, "One name of the model.", models.Model),
    Operation("POST", "/tokenize", tokens.tokenize, "The tokens of a text.", tokens.Tokens, tokens.TokenizeBody),
    Operation("POST", "/detokenize", tokens.detokenize, "The text of tokens.", tokens.Text, tokens.DetokenizeBody),
    Operation(
        "GET", "/tokenizer_info", tokens.tokenizer_info, "Control tokens and chat template.", tokens.TokenizerInfo
    ),
    Operation(
        "GET",
        attestation.PATH,
        attestation.show,
        "Evidence of what this server is, over a fresh nonce.",
        Evidence,
        query={"nonce": f"^[0-9a-f]{{{2 * NONCE_BYTES}}}$"},
        needs_key=False,
    ),
)


def routes(service: Service) -> list[Route]:
    """All of them, and the document that says so. What an endpoint raises is for ``guards/faults.py``."""
    every = [(one.method, one.path, one.endpoint) for one in OPERATIONS]
    every.append(("GET", "/openapi.json", documented_by(OPERATIONS)))
    if service.console is not None:
        every += [("GET", path, show) for path in service.console.pages]
        every += [("GET", "/console/about", about.about), ("POST", "/console/answer", answer.create)]
    return [Route(path, _found(path, partial(endpoint, service)), methods=[method]) for method, path, endpoint in every]


def _found(path: str, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint, which the log knows by the path of its route."""

    async def answer(request: Request) -> Response:
        found_endpoint(path)
        return await endpoint(request)

    return answer
