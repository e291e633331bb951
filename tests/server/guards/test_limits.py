"""A request has a size, a time to arrive and a number of headers; a key has a number of requests at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.commands import LIMIT_S
from tests.server.asgi import HOST, ask, echo, error_of
from tsqp.server.guards.faults import Faults
from tsqp.server.guards.limits import AtOnce, Bodies, Doors, HeaderCount
from tsqp.server.lifecycle import Lifecycle

MOST = 100
BODIES = Faults(Bodies(echo, MOST, 30.0))


async def pieces(*sizes: int) -> AsyncIterator[bytes]:
    for size in sizes:
        yield b"x" * size


@pytest.mark.parametrize("sizes", [(), (MOST,), (60, 40), (0, MOST, 0)], ids=str)
def test_a_body_within_the_limit_is_read_whole(sizes: tuple[int, ...]) -> None:
    answer = ask(BODIES, method="POST", content=pieces(*sizes))
    assert (answer.status_code, len(answer.content)) == (200, sum(sizes))


@pytest.mark.parametrize("sizes", [(MOST + 1,), (60, 41), (MOST, 1)], ids=str)
def test_a_body_over_the_limit_is_refused_while_it_comes(sizes: tuple[int, ...]) -> None:
    answer = ask(BODIES, method="POST", content=pieces(*sizes))
    assert answer.status_code == 413
    assert error_of(answer)["code"] == "request_too_large"


def test_an_announced_size_is_refused_before_anything_is_read() -> None:
    async def must_not_be_read() -> AsyncIterator[bytes]:
        raise AssertionError
        yield b""

    for size in (str(MOST + 1), "9" * 5000):
        answer = ask(BODIES, method="POST", headers={"content-length": size}, content=must_not_be_read())
        assert answer.status_code == 413


def test_a_body_that_does_not_come_is_408() -> None:
    async def stuck() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    answer = ask(Faults(Bodies(echo, MOST, 0.01)), method="POST", content=stuck())
    assert answer.status_code == 408
    assert error_of(answer)["code"] == "request_timeout"


def test_time_to_arrive_ends_with_the_body() -> None:
    """Afterwards an answer may take as long as it takes, and hears that its client has left."""
    heard: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        heard.append((await receive())["type"])
        heard.append((await receive())["type"])

    async def run() -> None:
        left = asyncio.Event()
        messages = iter([{"type": "http.request", "body": b"", "more_body": False}])

        async def receive() -> Message:
            try:
                return next(messages)
            except StopIteration:
                await left.wait()
                return {"type": "http.disconnect"}

        async def send(message: Message) -> None: ...

        scope = {"type": "http", "headers": []}
        task = asyncio.create_task(Bodies(app, MOST, 0.001)(scope, receive, send))
        while not heard:
            await asyncio.sleep(0)
        assert not (await asyncio.wait([task], timeout=0.01))[0]
        left.set()
        await task

    asyncio.run(run())
    assert heard == ["http.request", "http.disconnect"]


def test_a_client_that_leaves_while_it_sends_is_heard() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert [(await receive())["type"] for _ in range(2)] == ["http.request", "http.disconnect"]

    async def run() -> None:
        sent: list[Message] = [{"type": "http.request", "body": b"a", "more_body": True}, {"type": "http.disconnect"}]
        messages = iter(sent)

        async def receive() -> Message:
            return next(messages)

        async def send(message: Message) -> None: ...

        await Bodies(app, MOST, 1.0)({"type": "http", "headers": []}, receive, send)

    asyncio.run(run())


def test_too_many_headers_are_431() -> None:
    app = Faults(HeaderCount(echo, 20))
    assert ask(app, headers={f"x-{i}": "1" for i in range(10)}).status_code == 200
    answer = ask(app, headers={f"x-{i}": "1" for i in range(21)})
    assert answer.status_code == 431
    assert error_of(answer)["code"] == "too_many_headers"


class Held:
    """An application whose answers wait until they are let go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.begun = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.begun += 1
        await self.go.wait()
        await echo(scope, receive, send)


def as_tenant(app: ASGIApp) -> ASGIApp:
    async def named(scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["tenant"] = dict(scope["headers"])[b"x-who"].decode()
        await app(scope, receive, send)

    return named


def test_a_key_has_so_many_requests_at_once_and_takes_none_from_others() -> None:
    async def run() -> None:
        held = Held()
        at_once = AtOnce(held, 2, ["/livez"])
        transport = httpx.ASGITransport(Faults(as_tenant(at_once)))
        async with httpx.AsyncClient(transport=transport, base_url=HOST) as client:

            def ask_as(who: str, path: str = "/") -> asyncio.Task[httpx.Response]:
                return asyncio.create_task(client.get(path, headers={"x-who": who}))

            first = [ask_as("a"), ask_as("a"), ask_as("b"), ask_as("a", "/livez")]
            while held.begun < 4:
                await asyncio.sleep(0)
            refused = await ask_as("a")
            assert refused.status_code == 429
            error = error_of(refused)
            assert (error["type"], error["code"]) == ("rate_limit_error", "too_many_requests")
            assert refused.headers["retry-after"] == "1"
            gone = first.pop(0)
            gone.cancel()  # a client that leaves makes room
            await asyncio.gather(gone, return_exceptions=True)
            first.append(ask_as("a"))
            while held.begun < 5:
                await asyncio.sleep(0)
            held.go.set()
            assert [(await one).status_code for one in first] == [200] * 4
        assert not at_once._under_way

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))


def test_a_server_that_drains_takes_nothing_new() -> None:
    lifecycle = Lifecycle()
    app = Faults(Doors(echo, lifecycle, ["/readyz"]))
    assert ask(app).status_code == 200
    lifecycle.draining = True
    answer = ask(app)
    assert answer.status_code == 503
    assert error_of(answer)["code"] == "shutting_down"
    assert answer.headers["retry-after"] == "5"
    assert ask(app, "/readyz").status_code == 200
