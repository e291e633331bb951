"""What nobody dealt with becomes one constant sentence, and a log line without values."""

from __future__ import annotations

import logging

import pytest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.server.asgi import ask, echo, error_of
from tsqp.server.errors import ApiError
from tsqp.server.guards.faults import AnswerCutShort, Faults, exception_handlers

SECRET = "canary-7f3a"


async def fails(scope: Scope, receive: Receive, send: Send) -> None:
    raise ValueError(SECRET)


async def refuses(scope: Scope, receive: Receive, send: Send) -> None:
    raise ApiError(413, "too large")


async def fails_late(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"half", "more_body": True})
    raise ValueError(SECRET)


async def fails_after_its_end(scope: Scope, receive: Receive, send: Send) -> None:
    await echo(scope, receive, send)
    raise ValueError(SECRET)


def test_the_unexpected_is_500_and_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    answer = ask(Faults(fails))
    assert answer.status_code == 500
    assert error_of(answer)["type"] == "server_error"
    assert SECRET not in answer.text + caplog.text
    assert "ValueError at test_faults.py:" in caplog.text


def test_a_refusal_is_its_answer(caplog: pytest.LogCaptureFixture) -> None:
    answer = ask(Faults(refuses))
    assert (answer.status_code, error_of(answer)["message"]) == (413, "too large")
    assert not caplog.records


def test_an_answer_that_broke_off_does_not_look_whole(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(AnswerCutShort) as raised:
        ask(Faults(fails_late))
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__
    assert SECRET not in caplog.text


def test_an_answer_that_is_whole_stays_and_the_log_says_what_came_after_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert ask(Faults(fails_after_its_end)).status_code == 200
    assert "ValueError at test_faults.py:" in caplog.text
    assert SECRET not in caplog.text


def test_one_within_another_says_it_once(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(AnswerCutShort):
        ask(Faults(Faults(fails_late)))
    assert ask(Faults(Faults(fails))).status_code == 500
    assert len(caplog.records) == 2


@pytest.mark.parametrize("endpoint", [fails, fails_late])
def test_what_starlette_would_answer_itself_is_left_to_it(endpoint: ASGIApp, caplog: pytest.LogCaptureFixture) -> None:
    """Also what Starlette has no route for, and answers in words of its own."""
    app = Faults(Starlette(routes=[Mount("/in", endpoint)], exception_handlers=exception_handlers))
    assert error_of(ask(app, "/nowhere"))["code"] == "unknown_url"
    if endpoint is fails:
        assert error_of(ask(app, "/in/"))["code"] == "internal_error"
    else:
        with pytest.raises(AnswerCutShort):
            ask(app, "/in/")
    assert [record.getMessage().partition(" at ")[0] for record in caplog.records] == ["a request failed: ValueError"]


def test_a_client_that_has_left_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    async def leaves(scope: Scope, receive: Receive, send: Send) -> None:
        raise ClientDisconnect

    assert ask(Faults(leaves)).status_code == 499
    assert not caplog.records


def test_what_is_no_fault_passes() -> None:
    async def gives_up(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyboardInterrupt

    async def send(message: Message) -> None: ...

    async def receive() -> Message:
        return {}

    with pytest.raises(KeyboardInterrupt):
        Faults(gives_up)({"type": "http"}, receive, send).send(None)
