"""GET /openapi.json: what the server understands, as an OpenAPI document. It is made of the types that check bodies."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, TypeAlias

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tsqp.server.errors import ErrorReply
from tsqp.server.responses_types import InputMessage
from tsqp.server.service import Service

Endpoint: TypeAlias = Callable[[Service, Request], Awaitable[Response]]

_JSON = "application/json"
_NAMES = "#/components/schemas/{name}"
_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
_OPENAPI = "3.1.0"


@dataclass(frozen=True)
class Operation:
    """What can be asked at one path. ``body`` and ``reply`` are types; ``event``: of a stream, where there is one.

    ``query``: what has to be in the query of the path, and its pattern. ``needs_key``: where there are keys.
    """

    method: str
    path: str
    endpoint: Endpoint
    summary: str
    reply: type[msgspec.Struct]
    body: type[msgspec.Struct] | None = None
    event: type[msgspec.Struct] | None = None
    query: Mapping[str, str] = field(default_factory=dict)
    needs_key: bool = True

    @property
    def types(self) -> list[type[msgspec.Struct]]:
        return [one for one in (self.reply, self.body, self.event) if one is not None]


def documented_by(operations: Sequence[Operation]) -> Endpoint:
    """The endpoint that shows them."""
    encoded = msgspec.json.encode(document(operations))

    async def show(_service: Service, _request: Request) -> Response:
        return Response(encoded, media_type=_JSON)

    return show


def document(operations: Sequence[Operation]) -> dict[str, Any]:
    """OpenAPI of these. Ranges that need the model, and those of several fields at once, are not in it."""
    types = list(dict.fromkeys([one for operation in operations for one in operation.types] + [ErrorReply]))
    references, schemas = msgspec.json.schema_components(types, ref_template=_NAMES)
    _may_lack_type(schemas)
    by_type = dict(zip(types, references, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        path = _PARAMETER.sub(r"{\1}", operation.path)
        paths.setdefault(path, {})[operation.method.lower()] = _described(operation, by_type)
    return {
        "openapi": _OPENAPI,
        "info": {"title": "tsqp serve", "version": version("tsqp")},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {"Error": {"description": "Why not.", "content": _content(by_type[ErrorReply])}},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "Where there are keys."}},
        },
        "security": [{"key": []}],
    }


def _may_lack_type(schemas: dict[str, Any]) -> None:
    """An item of an input that does not say its type is a message, which the types that check bodies cannot say."""
    message = schemas.get(InputMessage.__name__)
    if message is not None:
        message["required"].remove("type")
        message["properties"]["type"]["enum"].append(None)


def _described(operation: Operation, by_type: dict[type[msgspec.Struct], dict[str, Any]]) -> dict[str, Any]:
    content = _content(by_type[operation.reply])
    if operation.event is not None:
        name = by_type[operation.event]["$ref"].rpartition("/")[2]
        data = {"type": "string", "description": f"A {name} as JSON, or [DONE]."}
        event = {"type": "object", "properties": {"event": {"type": "string"}, "data": data}, "required": ["data"]}
        content["text/event-stream"] = {"schema": {**event, "description": "An event of a stream: of stream: true."}}
    error = {"$ref": "#/components/responses/Error"}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {"200": {"description": "The answer.", "content": content}, "4XX": error, "5XX": error},
    }
    if not operation.needs_key:
        described["security"] = []
    names = _PARAMETER.findall(operation.path)
    if names:
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if operation.query:
        described.setdefault("parameters", []).extend(
            {"name": name, "in": "query", "required": True, "schema": {"type": "string", "pattern": pattern}}
            for name, pattern in operation.query.items()
        )
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": _content(by_type[operation.body])}
    return described


def _content(schema: dict[str, Any]) -> dict[str, Any]:
    return {_JSON: {"schema": schema}}
