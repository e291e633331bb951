"""Streams: what is sent when, in which sizes, and what happens when one side leaves."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.commands import LIMIT_S
from tests.server.serving import NAME, Exchange, Script, app_of, client_of, events_of, service_of
from tsqp.errors import ChannelClosed, NumericError, WorkerLost
from tsqp.server.settings import ServerSettings
from tsqp.server.streams import UNIT, Padding

CHAT = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "stream": True}


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), LIMIT_S))


@given(st.dictionaries(st.text(), st.text() | st.integers(), min_size=1), st.sampled_from([UNIT, 600]))
def test_a_padded_object_is_the_object_with_one_of_few_sizes(values: dict[str, Any], unit: int) -> None:
    data = json.dumps(values).encode()
    padded = Padding(unit)(data)
    read = json.loads(padded)
    assert {**read, "obfuscation": ""} == {**values, "obfuscation": ""}
    sizes = [unit * 2**power for power in range(20)]
    assert len(padded) in sizes
    assert len(padded) == unit or len(padded) < 2 * (len(data) + 20)


@pytest.mark.parametrize("length", range(495, 500))
def test_no_size_is_left_out(length: int) -> None:
    data = b'{"a":"' + b"a" * (length - 8) + b'"}'
    assert len(Padding()(data)) in (UNIT, 2 * UNIT)


def test_padding_is_random() -> None:
    assert Padding()(b'{"a":1}') != Padding()(b'{"a":1}')


def sizes_of(body: bytes) -> set[int]:
    return {len(line) for line in body.splitlines() if line.startswith(b"data: {")}


@pytest.mark.parametrize("extra", [{}, {"stream_options": {"include_usage": True}}], ids=["", "usage"])
@pytest.mark.parametrize("texts", [("a", "Wolkenkratzer, " * 4), ("\\\n\"'", "é€😀")])
def test_sizes_of_events_do_not_tell_lengths_of_tokens(texts: tuple[str, str], extra: dict[str, Any]) -> None:
    async def test() -> None:
        found = []
        for text in texts:
            async with client_of(service_of(Script(text))) as client:
                answer = await client.post("/v1/chat/completions", json={**CHAT, **extra})
                found.append(sizes_of(answer.content))
        assert found[0] == found[1]
        assert len(found[0]) == 1

    run(test)


@pytest.mark.parametrize(
    ("server", "client", "padded"), [(True, None, True), (True, False, False), (False, True, True)]
)
def test_a_client_may_choose_whether_its_stream_is_padded(server: bool, client: bool | None, padded: bool) -> None:
    async def test() -> None:
        service = service_of(Script("abc"), settings=ServerSettings(obfuscation=server))
        async with client_of(service) as http:
            body = {**CHAT, "stream_options": {"include_obfuscation": client}}
            answer = await http.post("/v1/chat/completions", json=body)
        assert all(("obfuscation" in event) is padded for event in events_of(answer.text))

    run(test)


def test_the_first_token_comes_before_the_last_is_there() -> None:
    async def test() -> None:
        more = asyncio.Event()
        exchange = Exchange(app_of(service_of(Script([104, more, 105]))), "/v1/chat/completions", CHAT)
        assert await exchange.status() == 200
        assert (await exchange.event())["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert (await exchange.event())["choices"][0]["delta"]["content"]
        more.set()
        await exchange.done

    run(test)


def test_silence_is_filled_with_comments_also_before_the_first_token() -> None:
    async def test() -> None:
        more = asyncio.Event()
        service = service_of(Script([more, 105]), settings=ServerSettings(keep_alive_s=0.01))
        exchange = Exchange(app_of(service), "/v1/chat/completions", CHAT)
        await exchange.status()
        await exchange.event()
        for _ in range(3):
            assert await exchange.body() == b": keep-alive\r\n\r\n"
        more.set()
        await exchange.done

    run(test)


def test_pings_are_at_most_fifteen_seconds_apart() -> None:
    assert 0 < ServerSettings().keep_alive_s <= 15


def test_a_client_that_leaves_ends_its_answers() -> None:
    async def test() -> None:
        never = asyncio.Event()
        script = Script([104, never])
        exchange = Exchange(app_of(service_of(script)), "/v1/chat/completions", {**CHAT, "n": 2})
        await exchange.status()
        await exchange.event()
        exchange.leave()
        await exchange.done
        assert sorted(script.ended) == [0, 1]

    run(test)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_a_client_that_leaves_before_a_whole_answer_ends_it(path: str) -> None:
    async def test() -> None:
        began, never = asyncio.Event(), asyncio.Event()
        script = Script([104, never])
        given: dict[str, Any] = {"messages": CHAT["messages"], "prompt": "Hi", "input": "Hi"}
        name = {"chat": "messages", "comp": "prompt", "resp": "input"}[path[4:8]]
        open_ = script.open

        async def opening(*args: Any, **options: Any) -> Any:
            began.set()
            return await open_(*args, **options)

        script.open = opening  # type: ignore[method-assign]
        exchange = Exchange(app_of(service_of(script)), path, {"model": NAME, name: given[name]})
        await began.wait()
        exchange.leave()
        await exchange.done
        assert script.ended == [0]

    run(test)


def test_a_client_that_is_gone_before_the_stream_begins_leaves_no_answer() -> None:
    async def test() -> None:
        never = asyncio.Event()
        script = Script([104, never])
        exchange = Exchange(app_of(service_of(script)), "/v1/chat/completions", CHAT)
        exchange.leave()
        await exchange.done
        assert len(script.opened) <= 1  # none where it was seen before the text was tokens
        assert script.ended == list(range(len(script.opened)))

    run(test)


@pytest.mark.parametrize(
    "error", [WorkerLost("secret"), ChannelClosed("secret"), NumericError("secret"), ValueError("secret")]
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_after_headers_an_error_is_the_last_event(error: Exception, path: str) -> None:
    async def test() -> None:
        body = {**CHAT, "prompt": "Hi"} if path == "/v1/completions" else CHAT
        async with client_of(service_of(Script([104, 105, error]))) as client:
            answer = await client.post(path, json=body)
        assert answer.status_code == 200
        events = events_of(answer.text)
        assert set(events[-1]) == {"error"}
        assert set(events[-1]["error"]) == {"message", "type", "param", "code"}
        assert all(choice.get("finish_reason") is None for event in events[:-1] for choice in event["choices"])
        assert "[DONE]" not in answer.text
        assert "secret" not in answer.text

    run(test)


def test_a_stream_ends_with_its_mark_and_nothing_after_it() -> None:
    async def test() -> None:
        async with client_of(service_of(Script("abc"))) as client:
            answer = await client.post("/v1/chat/completions", json=CHAT)
        assert answer.text.endswith("\r\n\r\ndata: [DONE]\r\n\r\n")
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"

    run(test)


def test_the_log_has_no_word_of_an_answer_at_any_level(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with client_of(service_of(Script("canary"))) as client:
            await client.post("/v1/chat/completions", json=CHAT)

    with caplog.at_level(logging.DEBUG):
        run(test)
    for letter in "canary":
        assert f'"content":"{letter}"' not in caplog.text
