"""Which request the code that runs now belongs to: what a line of the log says of it, and nothing a client chose."""

from __future__ import annotations

from contextvars import ContextVar
from typing import NamedTuple


class UnderWay(NamedTuple):
    """``request_id``: ours. ``endpoint``: the pattern of a route, a constant; None until a route was found."""

    request_id: str
    endpoint: str | None = None


# Each request has a task of its own, and so a context of its own; tasks that it starts have a copy.
_current: ContextVar[UnderWay | None] = ContextVar("tsqp_request", default=None)


def request_under_way() -> UnderWay | None:
    """The one that this is done for; None outside of requests."""
    return _current.get()


def begin_request(request_id: str) -> None:
    """From now on this is done for a request."""
    _current.set(UnderWay(request_id))


def found_endpoint(pattern: str) -> None:
    """The route of the request under way."""
    now = _current.get()
    if now is not None:
        _current.set(now._replace(endpoint=pattern))
