"""Slow clients, long headers and crowds, by plain sockets: bounds that uvicorn has not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import select
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from tests.commands import LIMIT_S
from tests.server.asgi import echo
from tests.server.sockets import Client, parsed, served
from tsqp.server.connection import Bounds, bounded
from tsqp.server.guards.faults import Faults
from tsqp.server.guards.limits import Bodies

LONG_S = 60.0
SHORT_S = 0.05
GET = "GET / HTTP/1.1\r\nhost: x\r\n\r\n"
POST = "POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n"


@pytest.fixture(scope="module")
def hasty() -> Iterator[int]:
    """Gives headers and bodies next to no time."""
    with served(Faults(Bodies(echo, 100, SHORT_S)), Bounds(100, SHORT_S, SHORT_S)) as port:
        yield port


@pytest.fixture(scope="module")
def patient() -> Iterator[int]:
    with served(Faults(Bodies(echo, 100, LONG_S)), Bounds(100, LONG_S, LONG_S)) as port:
        yield port


@contextlib.contextmanager
def said(port: int, text: str) -> Iterator[tuple[Client, bytes]]:
    """A connection that has sent this, and the first byte of what is said to it.

    On a busy machine a hasty server may have ended it before it has sent anything: then there is another one.
    """
    for _ in range(1000):
        with Client(port) as client:
            first = b""
            with contextlib.suppress(ConnectionError):
                client.send(text)
                first = client.socket.recv(1)
            if first:
                yield client, first
                return
    raise AssertionError("nothing was answered")


def test_a_request_is_answered_and_the_next_one_too(patient: int) -> None:
    with Client(patient) as client:
        for _ in range(2):
            client.send(POST + "0123456789")
            assert client.until(b"0123456789").startswith(b"HTTP/1.1 200")


def test_slow_headers_are_408(hasty: int) -> None:
    with said(hasty, GET[:-2]) as (client, first):
        status, error = parsed(first + client.rest())
    assert (status, error["code"]) == (408, "request_timeout")


def test_headers_that_drip_have_one_time_for_all(hasty: int) -> None:
    with Client(hasty) as client:
        client.send(GET[:-2])
        while not select.select([client.socket], [], [], SHORT_S / 10)[0]:
            client.send("x")
        assert client.until(b"\r\n").startswith(b"HTTP/1.1 408")


def test_a_connection_that_says_nothing_is_ended(hasty: int) -> None:
    with Client(hasty) as client:
        assert client.rest() == b""


def test_the_second_request_has_a_time_too(hasty: int) -> None:
    with said(hasty, POST + "0123456789") as (client, _):
        client.until(b"0123456789")
        client.send("GET")
        assert parsed(client.rest())[0] == 408


def test_a_slow_body_is_408_and_the_connection_ends(hasty: int) -> None:
    with said(hasty, POST + "01234") as (client, _):
        assert b"408" in client.until(b"\r\n")
        client.until(b"}}")
        client.send("5")  # what is left of the body has no more time than headers have
        assert client.rest() == b""


def test_a_slow_answer_is_not_a_slow_client(hasty: int) -> None:
    """Headers have a time, answers have not."""

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(3 * SHORT_S)
        await echo(scope, receive, send)

    with served(slow, Bounds(10, SHORT_S, SHORT_S)) as port, said(port, GET) as (client, _):
        assert b"200" in client.until(b"\r\n")


def test_a_client_that_takes_nothing_is_cut_off_and_the_endpoint_hears_of_it() -> None:
    heard = threading.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        left = asyncio.ensure_future(receive())
        while not left.done():
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
        if left.result()["type"] == "http.disconnect":
            heard.set()

    with served(endless, Bounds(10, LONG_S, SHORT_S)) as port, Client(port, receive_buffer=4096) as client:
        client.send(GET)
        assert heard.wait(LIMIT_S)


@pytest.mark.parametrize("bomb", ["x" * 5000, "x: " + "y" * 5000, "x: y\r\n" * 1000], ids=["name", "value", "many"])
def test_long_headers_are_431(patient: int, bomb: str) -> None:
    with Client(patient) as client:
        client.send(f"GET / HTTP/1.1\r\nhost: x\r\n{bomb}")
        status, error = parsed(client.rest())
    assert (status, error["code"]) == (431, "headers_too_long")


@pytest.mark.parametrize(
    "bytes_", ["\x16\x03\x01\x02\r\n\r\n", "GET / HTTP/1.1\r\n\r\n", "GET /\x00 HTTP/1.1\r\nhost: x\r\n\r\n"]
)
def test_what_is_no_http_is_400_in_the_shape_of_other_errors(patient: int, bytes_: str) -> None:
    with Client(patient) as client:
        client.send(bytes_)
        status, error = parsed(client.rest())
    assert (status, error["code"]) == (400, "invalid_http")


def test_a_broken_body_ends_the_request(patient: int) -> None:
    with Client(patient) as client:
        client.send("POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nnonsense\r\n")
        assert parsed(client.rest())[0] == 400


def test_a_body_that_breaks_while_it_is_answered_ends_both() -> None:
    heard = threading.Event()

    async def early(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        heard.set()

    with served(early, Bounds(10, LONG_S, LONG_S)) as port, Client(port) as client:
        client.send("POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        client.until(b"begun")
        client.send("nonsense\r\n")
        assert b"0\r\n\r\n" not in client.rest()  # the end of an answer would say that it is whole
        assert heard.wait(LIMIT_S)


PIECES = (
    *("GET / HTTP/1.1\r\n", "POST / HTTP/1.1\r\n", "host: x\r\n", "content-length: 3\r\n", "\r\n", "abc", "0\r\n\r\n"),
    *("transfer-encoding: chunked\r\n", "expect: 100-continue\r\n", "connection: upgrade\r\nupgrade: websocket\r\n"),
    *(
        "3\r\nabc\r\n",
        "FFFFFFFFFFFFFFFFFF\r\n",
        "connection: close\r\n",
        "\x00",
        "\r",
        "HTTP/1.0\r\n",
        "content-length: 9\r\n",
    ),
)


@settings(max_examples=60)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=12))
def test_whatever_comes_the_server_goes_on_without_a_fault(hasty: int, pieces: list[str]) -> None:
    with Client(hasty) as client:
        with contextlib.suppress(OSError):  # it has been ended; a shutdown then says that it is not connected
            client.send("".join(pieces))
            client.socket.shutdown(socket.SHUT_WR)
        for line in re.findall(rb"HTTP/1\.1 (\d+)", client.rest()):
            assert int(line) in (100, 200, 400, 408, 413, 431)
    with said(hasty, POST + "0123456789") as (client, _):
        assert b"200" in client.until(b"\r\n")


@pytest.fixture(autouse=True)
def _no_fault_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    faults = [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    assert not faults


def test_more_connections_than_there_may_be_are_told_so() -> None:
    with served(echo, Bounds(2, LONG_S, LONG_S)) as port, Client(port) as first, Client(port) as second:
        for client in (first, second):
            client.send(POST + "0123456789")
            client.until(b"0123456789")
        with Client(port) as third:
            third.send(GET)
            status, error = parsed(third.rest())
        assert (status, error["code"]) == (503, "too_many_connections")
        first.send(POST + "0123456789")  # those that were here first go on
        assert b"200" in first.until(b"\r\n")


def test_a_crowd_is_cut_off_without_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsqp.server.connection.SPARE", 0)
    with served(echo, Bounds(1, LONG_S, LONG_S)) as port, Client(port) as first:
        first.send(POST + "0123456789")
        first.until(b"0123456789")
        with Client(port) as second:
            assert second.rest() == b""


class FakeLoop:
    """Keeps what is to be called later."""

    def __init__(self) -> None:
        self.timers: list[FakeTimer] = []

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> FakeTimer:
        self.timers.append(FakeTimer(delay_s))
        return self.timers[-1]


@dataclass
class FakeTimer:
    delay_s: float
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeTransport(asyncio.Transport):
    """Leads nowhere."""

    def close(self) -> None: ...


def test_a_client_that_takes_something_has_as_long_again() -> None:
    loop: Any = FakeLoop()
    config = uvicorn.Config(echo, ws="none", lifespan="off", log_config=None)
    protocol = bounded(Bounds(1, 7.0, 9.0))(config, ServerState(), {}, loop)
    protocol.connection_made(FakeTransport())
    protocol.pause_writing()
    assert [(timer.delay_s, timer.cancelled) for timer in loop.timers] == [(7.0, False), (9.0, False)]
    protocol.resume_writing()
    assert loop.timers[1].cancelled
    protocol.pause_writing()
    protocol.connection_lost(None)
    assert all(timer.cancelled for timer in loop.timers)
