"""A whole answer as JSON."""

from __future__ import annotations

import msgspec
from starlette.responses import Response


def json_reply(value: msgspec.Struct) -> Response:
    """The value, with status 200."""
    return Response(msgspec.json.encode(value), media_type="application/json")
