"""GET /v1/models: the names of the one model that is served, plain and with each adapter."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tsqp.server.json_reply import json_reply
from tsqp.server.service import Service


class Model(msgspec.Struct, frozen=True):
    """``max_model_len``: the most tokens of a prompt and its answer. ``parent``: the model without its adapter."""

    id: str
    created: int
    max_model_len: int
    object: str = "model"
    owned_by: str = "tsqp"
    parent: str | None = None


class Models(msgspec.Struct, frozen=True):
    """All of them."""

    data: list[Model]
    object: str = "list"


async def list_all(service: Service, _request: Request) -> Response:
    """Each name."""
    return json_reply(Models([_model(service, name) for name in service.parents]))


async def show(service: Service, request: Request) -> Response:
    """One name, which may have slashes. Raises ApiError for another."""
    name = request.path_params["name"]
    service.adapter_of(name)
    return json_reply(_model(service, name))


def _model(service: Service, name: str) -> Model:
    return Model(name, service.created, service.context, parent=service.parents[name][0])
