"""Answers as server-sent events: each a JSON object, padded so that its size does not tell how long a token was.

Covers: sizes of events are few and powers of two times a unit that is the same for a whole server, so tokens of
usual lengths all make events of one size (tests/server/test_streams.py).
Does not cover: how many events there are and when; what is not streamed.
Assumes: nothing compresses the stream on its way. Padding is random, so that compression gains little.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from tsqp.server.answers import Answers
from tsqp.server.handlers import translated
from tsqp.server.params import SamplingBody
from tsqp.server.service import Service

# The library writes every chunk into its log at this level, and a chunk is the user's text.
logging.getLogger("sse_starlette").setLevel(logging.INFO)

DONE = b"data: [DONE]\r\n\r\n"
UNIT = 512  # bytes: an event with a token of usual length has fewer, but for the model's name
_FIELD = b',"obfuscation":"'


class Padding:
    """Pads JSON objects with a field of random letters. ``unit``: the least size, in bytes."""

    def __init__(self, unit: int = UNIT) -> None:
        self._unit = unit

    def __call__(self, data: bytes) -> bytes:
        """The same object with the size ``unit``, or twice, four times … that."""
        least = len(data) + len(_FIELD) + 1
        size = self._unit
        while size < least:
            size *= 2
        random = secrets.token_hex((size - least + 1) // 2).encode()[: size - least]
        return data[:-1] + _FIELD + random + b'"}'


def padding_of(service: Service, body: SamplingBody) -> Padding | None:
    """As the client wants it, or else the server."""
    asked = None if body.stream_options is None else body.stream_options.include_obfuscation
    wanted = service.settings.obfuscation if asked is None else asked
    return Padding(UNIT + len(service.name_in_answers(body.model).encode())) if wanted else None


class Event(msgspec.Struct, frozen=True):
    """The data of an event, and its name where it has one."""

    data: msgspec.Struct
    name: str | None = None


class EventStream(EventSourceResponse):
    """Sends events while answers go on, and comments while there are none. The answers end with it, whatever happens.

    A server that shuts down does not cut the stream: the engine ends the answers, and the stream says so.
    """

    def __init__(
        self,
        service: Service,
        answers: Answers,
        events: AsyncGenerator[Event, None],
        *,
        padding: Padding | None,
        end: bytes = DONE,
    ) -> None:
        super().__init__(
            framed(events, padding, end),
            ping=service.settings.keep_alive_s,
            ping_message_factory=_comment,
            shutdown_grace_period=math.inf,
        )
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._answers:
            await super().__call__(scope, receive, send)


async def framed(
    events: AsyncGenerator[Event, None], padding: Padding | None, end: bytes
) -> AsyncGenerator[bytes, None]:
    """The bytes of each event; where they fail, an event with the error is the last one and ``end`` does not come."""
    try:
        async with aclosing(events):
            async for event in events:
                data = msgspec.json.encode(event.data)
                name = b"" if event.name is None else b"event: " + event.name.encode() + b"\r\n"
                yield name + b"data: " + (data if padding is None else padding(data)) + b"\r\n\r\n"
    except Exception as error:
        yield b"data: " + translated(error).encode() + b"\r\n\r\n"
        return
    if end:
        yield end


def _comment() -> ServerSentEvent:
    return ServerSentEvent(comment="keep-alive")
