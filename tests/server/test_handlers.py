"""Errors: one shape, a status by class, and no text that was not meant for a client."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tests.server.serving import NAME, Script, client_of, service_of
from tsqp import errors
from tsqp.server.discreet import DiscreetFormatter
from tsqp.server.errors import ApiError
from tsqp.server.handlers import translated

SECRET = "secret-4711"
FIELDS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/responses": "input"}


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (errors.QueueFull(SECRET), 429, True),
        (errors.PadsExhausted(SECRET), 503, True),
        (errors.WorkerLost(SECRET), 503, True),
        (errors.ChannelClosed(SECRET), 503, True),
        (errors.MalformedAddress(SECRET), 503, True),
        (errors.ProductMismatch(SECRET), 503, False),
        (errors.NumericError(SECRET), 500, False),
        (errors.PadReused(SECRET), 500, False),
        (errors.TsqpError(SECRET), 500, False),
        (ValueError(SECRET), 500, False),
        (HTTPException(404, SECRET), 404, False),
        (HTTPException(405, SECRET), 405, False),
        (HTTPException(499, SECRET), 499, False),
        (HTTPException(413, SECRET), 413, False),
        (ClientDisconnect(SECRET), 499, False),
    ],
)
def test_a_class_has_its_status_and_a_constant_text(error: Exception, status: int, retry: bool) -> None:
    told = translated(error)
    assert told.status == status
    assert ("retry-after" in told.headers, told.headers["x-should-retry"]) == (retry, str(retry).lower())
    assert SECRET not in told.encode().decode()
    assert told.body.type


def test_what_the_package_says_of_an_option_is_told_with_its_name_in_the_api() -> None:
    told = translated(errors.OptionError("structured_outputs must be so", fields=("structured_outputs",)))
    assert (told.status, told.body.message, told.body.param) == (400, "response_format must be so", "response_format")
    told = translated(errors.InputError("compute.kv_memory is 5", fields=("compute.kv_memory",)))
    assert (told.status, told.body.param, told.body.code) == (400, "max_tokens", "context_length_exceeded")
    assert "kv_memory" not in told.body.message
    told = translated(errors.InputError("guard.pads_ahead is 5", fields=("guard.pads_empty", "guard.pads_ahead")))
    assert (told.status, told.body.param, told.body.code) == (400, "max_tokens", "context_length_exceeded")
    assert "pads_ahead" not in told.body.message
    assert "retry-after" not in told.headers
    told = translated(errors.PromptError("the template refuses this"))
    assert (told.status, told.body.message, told.body.param) == (400, "the template refuses this", None)


def test_an_error_is_itself_and_never_longer_than_it_may_be() -> None:
    error = ApiError(400, "é" * 100_000, param="x")
    assert translated(error) is error
    assert len(error.encode()) <= 4096


def test_the_log_has_the_class_and_the_place_of_what_nobody_expected(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        try:
            raise ZeroDivisionError(SECRET)
        except ZeroDivisionError as error:
            translated(error)
    assert "a request failed: ZeroDivisionError at test_handlers.py" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("path", list(FIELDS))
def test_the_log_and_the_answer_have_one_id_of_what_nobody_expected(
    path: str, begun: bool, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.handler.setFormatter(DiscreetFormatter())

    async def test() -> tuple[str, str]:
        given: dict[str, Any] = {"messages": [{"role": "user", "content": SECRET}], "prompt": SECRET, "input": SECRET}
        body = {"model": NAME, "stream": stream, FIELDS[path]: given[FIELDS[path]]}
        script = Script([104, ValueError(SECRET)] if begun else ValueError(SECRET))
        async with client_of(service_of(script)) as client:
            answer = await client.post(path, json=body, headers={"x-request-id": "theirs"})
        return answer.headers["x-tsqp-request-id"], answer.text

    number, text = asyncio.run(test())
    assert "the server has failed" in text
    assert "internal_error" in text
    (line,) = caplog.text.splitlines()
    assert f" tsqp.server: {number}: a request failed: ValueError at " in line
    assert re.fullmatch("req_[0-9a-f]{32}", number)
    assert SECRET not in text + caplog.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", f"/{SECRET}", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", f"/v1/models/{SECRET}", 404),
    ],
)
def test_paths_and_methods_that_are_none_have_the_same_shape(method: str, path: str, status: int) -> None:
    async def test() -> None:
        async with client_of(service_of(Script("a"))) as client:
            answer = await client.request(method, path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert SECRET not in answer.text
        assert status != 405 or answer.headers["allow"]

    asyncio.run(test())


@pytest.mark.parametrize("path", list(FIELDS))
@pytest.mark.parametrize("stream", [False, True])
def test_what_opening_raises_is_an_answer_and_no_stream(path: str, stream: bool) -> None:
    async def test(error: Exception, status: int) -> None:
        said: dict[str, Any] = {"messages": [{"role": "user", "content": SECRET}], "prompt": SECRET, "input": SECRET}
        name = FIELDS[path]
        body = {"model": NAME, "stream": stream, name: said[name]}
        script = Script(error)
        async with client_of(service_of(script)) as client:
            answer = await client.post(path, json=body)
        assert answer.status_code == status
        assert answer.headers["x-tsqp-protection"] == "local"
        assert answer.json()["error"]["message"]
        assert SECRET not in answer.text

    for error, status in ((errors.QueueFull(SECRET), 429), (errors.PadsExhausted(SECRET), 503), (OSError(SECRET), 500)):
        asyncio.run(test(error, status))


def test_where_one_of_several_answers_cannot_begin_none_does() -> None:
    async def test() -> None:
        script = Script("abc", "abc", errors.QueueFull("full"))
        body = {"model": NAME, "messages": [{"role": "user", "content": "x"}], "n": 3}
        async with client_of(service_of(script)) as client:
            assert (await client.post("/v1/chat/completions", json=body)).status_code == 429
        assert sorted(script.ended) == [0, 1]

    asyncio.run(test())
