"""POST /console/answer: a streamed chat answer, then what the worker saw of it."""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tsqp.errors import CheckFailed
from tsqp.server.answers import Answers, unless_left
from tsqp.server.body import read_body
from tsqp.server.chat import Prepared, encoded, prepared
from tsqp.server.chat_types import ChatBody
from tsqp.server.console.console import Watch
from tsqp.server.console.states import with_states
from tsqp.server.errors import ApiError
from tsqp.server.params import salt_of
from tsqp.server.receipts import refuse_receipt
from tsqp.server.response_format import form_errors
from tsqp.server.streams import Event, EventStream, padding_of

if TYPE_CHECKING:
    from tsqp.audit.onlooker import Look
    from tsqp.server.service import Service

PICTURE_OF = "qkv of layer 0"
EXPECTED = "x-tsqp-expect-protection"  # the mode that the page shows to whoever typed the message


class Seen(msgspec.Struct, frozen=True):
    """See ``docs/console.md`` §3."""

    protection: str
    bytes_seen: int
    calls: int
    kept_bytes: int
    uniformity_p: float | None
    recovered_text: str
    recovered_fraction: float
    noise_fraction: float
    user_tokens: int
    picture: str
    picture_of: str
    picture_width: int
    histogram: list[int]
    histogram_expected: list[float]
    pads_left: int | None
    checks: int
    tokens: int
    seconds: float


async def create(service: Service, request: Request) -> Response:
    """The endpoint."""
    body = await read_body(service, request, ChatBody)
    # Before the prompt is made: the server may have come back in another mode since the page asked who it is.
    if any(expected != service.protection for expected in request.headers.getlist(EXPECTED)):
        text = f"this server is at {service.protection}, and another protection was expected"
        raise ApiError(409, text, code="other_protection")
    if not body.stream:
        raise ApiError(400, "the console shows streams: ask with stream: true", param="stream", code="invalid_value")
    if body.choices != 1:
        raise ApiError(400, "the console shows one answer: n must be 1", param="n", code="invalid_value")
    if body.stream_options is not None and body.stream_options.include_receipt:
        refuse_receipt("the console gives no receipts")
    return await unless_left(request, _answered(service, request, body))


async def _answered(service: Service, request: Request, body: ChatBody) -> Response:
    if service.console is None:
        raise ApiError(404, "there is no console here", code="unknown_url")
    asked = await prepared(service, body)
    watch = service.console.watch(asked.prompt, await _users_tokens(service, body, asked))
    try:
        with form_errors("response_format", both=asked.either):
            one = asked.choice(0, watch.tap)
            answers = await Answers.open(service, request, "console", [one], salt_of(body))
    except BaseException:
        watch.close()
        raise
    events = with_states(_events(service, asked, answers, watch), lambda: service.model.worker_state)
    return _WatchedStream(service, answers, events, watch, body)


class _WatchedStream(EventStream):
    """What was seen goes with the stream, whatever happens."""

    def __init__(
        self,
        service: Service,
        answers: Answers,
        events: AsyncGenerator[Event, None],
        watch: Watch,
        body: ChatBody,
    ) -> None:
        super().__init__(service, answers, events, padding=padding_of(service, body))
        self._watch = watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._watch.close()


async def _users_tokens(service: Service, body: ChatBody, asked: Prepared) -> range:
    """Where the text of the user's last message is in the prompt: its first tokens, as many as an audit takes."""
    from tsqp.audit.prompt import MAX_TOKENS, OTHER_TEXTS, users_part

    places = [index for index, message in enumerate(body.messages) if message.role == "user"]
    if not places:
        return range(0)
    others = []
    for text in OTHER_TEXTS:
        messages = list(body.messages)
        messages[places[-1]] = msgspec.structs.replace(messages[places[-1]], content=text)
        others.append(await encoded(service, messages, asked.tools, body.chat_template_kwargs))
    part = users_part(asked.prompt, others)
    return range(part.start, min(part.stop, part.start + MAX_TOKENS))


async def _events(service: Service, asked: Prepared, answers: Answers, watch: Watch) -> AsyncGenerator[Event, None]:
    """The chunks of the chat API, then what was seen."""
    began = time.perf_counter()
    try:
        async with aclosing(asked.reply.events(answers)) as chunks:
            async for chunk in chunks:
                yield chunk
    except CheckFailed:
        text = "a worker or dealer was caught: a product of it was wrong, and nothing was made of it"
        raise ApiError(503, text, kind="server_error", code="worker_cheated") from None
    seconds = time.perf_counter() - began
    yield Event(_seen(service, watch, await watch.look(), asked.reply.answer_tokens, seconds), "seen")


def _seen(service: Service, watch: Watch, look: Look, tokens: int, seconds: float) -> Seen:
    guard, tap, picture = service.model.llm.guard, watch.tap, look.picture
    return Seen(
        service.protection,
        tap.bytes_seen,
        tap.calls,
        tap.kept_bytes,
        look.uniformity_p,
        look.recovered_text,
        look.recovered_fraction,
        look.noise_fraction,
        len(watch.user),
        b64encode(picture.pixels).decode(),
        PICTURE_OF,
        picture.width,
        [int(count) for count in picture.counts],
        [float(share) for share in picture.expected],
        None if guard is None or guard.filler is None else guard.filler.ready(answer=True),
        tap.checks,
        tokens,
        seconds,
    )
