"""A server that plays the console's endpoints from a script: what the page makes of each case, without a model."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import tsqp
from tests.commands import LIMIT_S
from tsqp.server.console.pages import HEADERS

STATIC = Path(tsqp.__file__).parent / "server" / "console" / "static"


@dataclass(frozen=True)
class Named:
    """An event with a name: ``state`` or ``seen``."""

    name: str
    value: dict[str, Any]


@dataclass(frozen=True)
class Failure:
    """An error: the whole answer where it is the first step, the last event of the stream where it is not."""

    status: int
    code: str
    message: str
    retry_after_s: int | None = None


class Gate:
    """Holds an answer until a test has looked at the page."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def reached(self) -> bool:
        return self._loop is not None

    async def passed(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._event.wait()

    def open(self) -> None:
        """From the thread of a test, once the answer has come so far."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._event.set)


class Cut:
    """The stream ends here without its end mark."""


class Broken:
    """The connection ends here, in the middle of the body: the last chunk of HTTP does not come."""


Step = str | Named | Failure | Gate | Cut | Broken  # a string is a piece of text


ABOUT = {
    "model": "smollm2-135m-instruct",
    "protection": "masked",
    "fingerprint": "tsqp-masked-0123456789ab",
    "context": 8192,
    "version": "0.1.0",
}


class FakeServer:
    """``script``: the steps of each answer, after ``refusals``. ``asked``: all bodies. ``key``: what they must have.

    ``about``: what it says of itself, once ``about_gate`` is open. ``comes_back_at``: the mode in which the next
    message finds it. ``answers_at``: the mode of answers, if not its own, of a server that ignores what is expected.
    ``left`` is set when a client goes before the end of its answer.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.reset()

    def reset(self) -> None:
        """As it was at first."""
        self.script: Sequence[Step] = ()
        self.refusals: list[Failure] = []
        self.asked: list[dict[str, Any]] = []
        self.about: dict[str, Any] = dict(ABOUT)
        self.about_gate: Gate | None = None
        self.comes_back_at: str | None = None
        self.answers_at: str | None = None
        self.key: str | None = None
        self.left = threading.Event()

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/", self._page),
                Route("/console/about", self._about),
                Route("/console/answer", self._answer, methods=["POST"]),
                Route("/console/{name}", self._file),
            ]
        )

    async def _page(self, _request: Request) -> Response:
        return FileResponse(STATIC / "index.html", headers=HEADERS)

    async def _file(self, request: Request) -> Response:
        names = {path.name: path for path in STATIC.iterdir()}
        if request.path_params["name"] not in names:
            return Response(status_code=404)
        return FileResponse(names[request.path_params["name"]], headers=HEADERS)

    async def _about(self, request: Request) -> Response:
        if self.about_gate is not None:
            await self.about_gate.passed()
        return self._refused(request) or JSONResponse(self.about)

    async def _answer(self, request: Request) -> Response:
        refused = self._refused(request)
        if refused is not None:
            return refused
        self.asked.append(await request.json())
        if self.comes_back_at is not None:
            self.about = {**self.about, "protection": self.comes_back_at}
        if request.headers["x-tsqp-expect-protection"] != self.about["protection"]:
            text = f"this server is at {self.about['protection']}, and another protection was expected"
            return _failed(Failure(409, "other_protection", text))
        if self.refusals:
            return _failed(self.refusals.pop(0))
        if self.script and isinstance(self.script[0], Failure):
            return _failed(self.script[0])
        headers = {"x-tsqp-protection": self.answers_at or self.about["protection"]}
        return StreamingResponse(self._stream(self.script), headers=headers, media_type="text/event-stream")

    def _refused(self, request: Request) -> Response | None:
        if self.key in (None, request.headers.get("authorization", "").removeprefix("Bearer ")):
            return None
        return _failed(Failure(401, "invalid_api_key", "give a valid API key"))

    async def _stream(self, script: Sequence[Step]) -> AsyncIterator[bytes]:
        try:
            yield _chunk({"role": "assistant", "content": ""})
            for step in script:
                match step:
                    case str():
                        yield _chunk({"content": step})
                    case Named():
                        if step.name == "seen":
                            yield _chunk({}, "stop")
                        yield f"event: {step.name}\r\ndata: {json.dumps(step.value)}\r\n\r\n".encode()
                    case Failure():
                        yield b"data: " + _error(step) + b"\r\n\r\n"
                        return
                    case Gate():
                        yield b": keep-alive\r\n\r\n"
                        await step.passed()
                    case Cut():
                        return
                    case Broken():
                        raise RuntimeError("the script breaks the connection")  # uvicorn closes it
            yield b"data: [DONE]\r\n\r\n"
        except asyncio.CancelledError:
            self.left.set()
            raise


def _chunk(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return b"data: " + json.dumps({"id": "chatcmpl-0", "choices": [choice]}).encode() + b"\r\n\r\n"


def _error(failure: Failure) -> bytes:
    error = {"message": failure.message, "type": "server_error", "param": None, "code": failure.code}
    return json.dumps({"error": error}).encode()


def _failed(failure: Failure) -> Response:
    headers = {} if failure.retry_after_s is None else {"retry-after": str(failure.retry_after_s)}
    return Response(_error(failure), failure.status, headers, "application/json")


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    """A server on a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    fake = FakeServer(f"http://127.0.0.1:{listener.getsockname()[1]}/")
    config = uvicorn.Config(fake.app(), log_config=None, lifespan="off", ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield fake
    finally:
        server.should_exit = True
        thread.join(LIMIT_S)
        listener.close()
