"""GET /console/about: what is served here. It needs a key, so it is how the page tries one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tsqp import __version__
from tsqp.server.json_reply import json_reply

if TYPE_CHECKING:
    from tsqp.server.service import Service


class About(msgspec.Struct, frozen=True):
    """``context``: the most tokens of a prompt and its answer."""

    model: str
    protection: str
    fingerprint: str
    context: int
    version: str


async def about(service: Service, _request: Request) -> Response:
    """The endpoint."""
    return json_reply(About(service.name, service.protection, service.fingerprint, service.context, __version__))
