"""Servers for tests: a real one on a thread, and answers that are written before they are asked for."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp

from tests.commands import LIMIT_S
from tests.server.chat_model import CONTEXT, IM_END, chat_text_format
from tsqp.api.answer import Answer, Delta, Ends
from tsqp.api.async_llm import AsyncLLM
from tsqp.api.worker_state import WorkerState
from tsqp.checkpoint.base import TextFormat
from tsqp.server.guards.faults import Faults, exception_handlers
from tsqp.server.guards.headers import AnswerHeaders
from tsqp.server.routes import routes
from tsqp.server.service import Service
from tsqp.server.settings import ServerSettings
from tsqp.trusted.engine.logprobs import TokenLogprobs
from tsqp.trusted.engine.request import Output
from tsqp.trusted.engine.sampling_params import SamplingParams
from tsqp.trusted.tap import Tap
from tsqp.trusted.text.tokenizer import TextStream, Tokenizer

NAME = "tiny/chat"
VOCAB = 320


def service_of(model: Any, **changes: Any) -> Service:
    """A service with the names and settings of tests."""
    service = Service(cast(AsyncLLM, model), (NAME, "tiny"), ServerSettings(), "local", "tsqp-local-0123456789ab")
    return replace(service, **changes)


def app_of(service: Service) -> ASGIApp:
    """The endpoints, without guards that refuse."""
    endpoints = Starlette(routes=routes(service), exception_handlers=exception_handlers)
    return AnswerHeaders(Faults(endpoints), {"x-tsqp-protection": service.protection})


def client_of(service: Service) -> httpx.AsyncClient:
    """A client in this process."""
    transport = httpx.ASGITransport(app=app_of(service), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://server")


@contextmanager
def served(service: Service) -> Iterator[str]:
    """The address of a real server on a thread."""
    listener = socket.create_server(("127.0.0.1", 0))  # connections wait in it until they are taken
    config = uvicorn.Config(app_of(service), log_config=None, lifespan="off", ws="none", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(LIMIT_S)
        listener.close()


def chat_tokenizer() -> Tokenizer:
    """That of the tiny chat model."""
    return Tokenizer(chat_text_format())


Step = int | Exception | asyncio.Event  # a token, the end by an error, or something to wait for


class Script:
    """Stands in for an ``AsyncLLM``: each answer is the next of ``answers``, and after the last the first again.

    ``opened`` and ``ended`` are what was asked for and which answers were left, with their number.
    """

    def __init__(self, *answers: Sequence[Step] | str | Exception, text_format: TextFormat | None = None) -> None:
        self.tokenizer = Tokenizer(text_format or chat_text_format())
        self.answers = answers
        config = SimpleNamespace(max_positions=CONTEXT, vocab_size=VOCAB)
        self.llm = SimpleNamespace(tokenizer=self.tokenizer, config=config, guard=None, most_promised=None)
        self.worker_state: WorkerState | None = None
        self.opened: list[Opened] = []
        self.ended: list[int] = []

    async def open(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        tenant: str = "",
        salt: str | None = None,
        tap: Tap | None = None,
        lora: str | None = None,
        ends: Ends | None = None,
        goes_on: bool | None = None,
    ) -> ScriptedAnswer:
        """The next answer, or an exception where that is its script."""
        number = len(self.opened)
        self.opened.append(Opened(list(prompt), params, tenant, salt, tap, lora))
        script = self.answers[number % len(self.answers)]
        if isinstance(script, Exception):
            raise script
        steps = self.tokenizer.encode(script, special_tokens=False) if isinstance(script, str) else list(script)
        return ScriptedAnswer(self, number, steps, params, ends, goes_on is not False)


@dataclass
class Opened:
    """What was asked of a script."""

    prompt: list[int]
    params: SamplingParams
    tenant: str
    salt: str | None
    tap: Tap | None = None
    lora: str | None = None


@dataclass
class ScriptedAnswer:
    """Stands in for an ``AsyncAnswer``. After its last step comes the end token, or the bound of tokens."""

    script: Script
    number: int
    steps: Sequence[Step]
    params: SamplingParams
    ends: Ends | None = None
    goes_on: bool = True
    waits: list[asyncio.Event] = field(default_factory=list)

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        return tuple(self.script.opened[self.number].prompt)

    def abort(self) -> None:
        self.script.ended.append(self.number)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        entries: list[TokenLogprobs] = []
        wanted = self.params.logprobs
        prompt = list(self.prompt_token_ids)
        text = TextStream(self.script.tokenizer, self.params.stop, after=prompt if self.goes_on else ())
        answer = Answer(prompt, text, None if wanted is None else entries, self.ends)
        given = 0
        for step in [*self.steps, IM_END]:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, asyncio.Event):
                await step.wait()
                continue
            given += 1
            entries.append(TokenLogprobs(step, -0.25 * given, tuple((one, -1.0) for one in range(wanted or 0))))
            reason = "stop" if step == IM_END else "length" if given >= self.params.max_tokens else None
            delta = answer.extend(Output(self.number, step, cast(Any, reason)))
            yield delta
            if delta.completion is not None:
                return


class Exchange:
    """One request of an app, message by message: what it sends is there at once, and the client may leave."""

    def __init__(self, app: ASGIApp, path: str, body: dict[str, Any]) -> None:
        self._sent = asyncio.Queue[dict[str, Any]]()
        self._received = asyncio.Queue[dict[str, Any]]()
        self._received.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 1),
            "scheme": "http",
            "state": {"tenant": "a tenant"},
        }

        async def send(message: Any) -> None:
            self._sent.put_nowait(message)

        self.done = asyncio.ensure_future(app(scope, self._received.get, send))

    async def status(self) -> int:
        """The first message."""
        return int((await self._sent.get())["status"])

    async def body(self) -> bytes:
        """The next piece of the body."""
        return cast(bytes, (await self._sent.get())["body"])

    async def event(self) -> dict[str, Any]:
        """The next event that is JSON; comments are passed over."""
        while True:
            for event in events_of((await self.body()).decode()):
                return event

    def leave(self) -> None:
        """The client is gone."""
        self._received.put_nowait({"type": "http.disconnect"})


def events_of(text: str) -> list[dict[str, Any]]:
    """The JSON of every event of a stream; the end mark is none."""
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(one) for one in data if one != "[DONE]"]
