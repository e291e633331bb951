"""One connection: uvicorn's HTTP/1.1, with the bounds of time and number that it lacks.

Covers: a client that sends its headers slowly, or nothing; one that takes nothing of an answer; headers that are too
long; more connections than there may be (tests/server/test_connection.py). Slow bodies: ``guards/limits.py``.
Does not cover: a TLS handshake, which has 60 s, and is not among the connections that are counted.
"""

from __future__ import annotations

import asyncio
import sys
from typing import NamedTuple

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from tsqp.server.errors import ApiError

SPARE = 64  # connections over the limit that are told so; those beyond are cut


class Bounds(NamedTuple):
    """``head_s``: for the headers of a request to arrive. ``stall_s``: how long a client may take nothing."""

    connections: int
    head_s: float
    stall_s: float


def bounded(bounds: Bounds) -> type[BoundedProtocol]:
    """The protocol with these bounds, as uvicorn takes it."""
    return type("BoundedProtocol", (BoundedProtocol,), {"bounds": bounds})


class BoundedProtocol(H11Protocol):
    """See the module. What is refused here is answered in the shape of other errors."""

    bounds: Bounds
    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _heard = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        surplus = len(self.connections) - self.bounds.connections
        if surplus > SPARE:
            transport.abort()
            return
        if surplus > 0:
            self.app = _full  # answered after its headers: closed before, the answer could be lost
        self._await_head()

    def data_received(self, data: bytes) -> None:
        self._heard = True
        if self._idle():
            self._await_head()
        super().data_received(data)
        if not self._idle():
            self._stop_head_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_stall_timer()
        # Not close, which waits until the client has taken what is left.
        self._stall_timer = self.loop.call_later(self.bounds.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_stall_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_stall_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Called for bytes that are no HTTP, or too many of them."""
        cause = sys.exception()
        status = cause.error_status_hint if isinstance(cause, h11.RemoteProtocolError) else 400
        if status == 431:
            self._refuse(ApiError(431, "the headers of the request are too long", code="headers_too_long"))
        else:
            self._refuse(ApiError(400, "the request is not valid HTTP/1.1", code="invalid_http"))

    def _idle(self) -> bool:
        """Whether no request is under way whose headers have arrived."""
        return self.cycle is None or self.cycle.response_complete

    def _await_head(self) -> None:
        """Give a request until ``head_s`` from now, unless one has begun to arrive already."""
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.bounds.head_s, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if not self._heard:
            self.transport.abort()  # who has said nothing expects no answer
            return
        message = f"the headers did not arrive within {self.bounds.head_s:g} s"
        self._refuse(ApiError(408, message, code="request_timeout"))

    def _refuse(self, error: ApiError) -> None:
        """Answer, if nothing of another answer has been sent, and end the connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # whoever computes for it is to stop
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        response = error.response()
        head = h11.Response(
            status_code=error.status,
            headers=[*response.raw_headers, (b"connection", b"close")],
            reason=STATUS_PHRASES[error.status],
        )
        for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


async def _full(scope: Scope, receive: Receive, send: Send) -> None:
    """The application of connections that are too many."""
    error = ApiError(503, "too many connections", kind="server_error", code="too_many_connections", retry_after_s=1.0)
    response = error.response()
    response.headers["connection"] = "close"
    await response(scope, receive, send)
