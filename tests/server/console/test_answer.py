"""An answer that is looked at: the stream of the chat API, what was seen after it, and one at a time."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import pytest

from tests.commands import LIMIT_S
from tests.server.console.watching import BODY, LOOK, URL, USER, ScriptedOnlooker, console_service, named_events
from tests.server.serving import Exchange, Script, app_of, client_of, service_of
from tests.server.worker_states import worker_state
from tsqp.audit.prompt import MAX_TOKENS
from tsqp.errors import ChannelClosed, ProductMismatch, QueueFull, WorkerLost
from tsqp.server.console.console import Console
from tsqp.server.service import Service

SEEN = {
    "protection",
    "bytes_seen",
    "calls",
    "kept_bytes",
    "uniformity_p",
    "recovered_text",
    "recovered_fraction",
    "noise_fraction",
    "user_tokens",
    "picture",
    "picture_of",
    "picture_width",
    "histogram",
    "histogram_expected",
    "pads_left",
    "checks",
    "tokens",
    "seconds",
}
UNPADDED = {"stream_options": {"include_obfuscation": False}}


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), LIMIT_S))


def asked(service: Service, *bodies: dict[str, Any]) -> list[httpx.Response]:
    """The answers to bodies, one after the other."""

    async def ask() -> list[httpx.Response]:
        async with client_of(service) as client:
            return [await client.post(URL, json={**BODY, **body}) for body in bodies]

    return asyncio.run(asyncio.wait_for(ask(), LIMIT_S))


def told(script: Script, **body: Any) -> list[tuple[str | None, Any]]:
    (answer,) = asked(console_service(script), body)
    assert answer.status_code == 200, answer.text
    return named_events(answer.text)


@pytest.mark.parametrize(
    ("body", "text", "reason", "tokens"),
    [({}, "Hi there", "stop", 8), ({"stop": "th"}, "Hi ", "stop", 5), ({"max_tokens": 4}, "Hi t", "length", 4)],
)
def test_what_was_seen_comes_after_the_last_chunk_however_the_answer_ends(
    body: dict[str, Any], text: str, reason: str, tokens: int
) -> None:
    events = told(Script("Hi there"), **body, **UNPADDED)
    names = [name for name, _ in events]
    assert names == [None] * (len(events) - 2) + ["seen", None]
    assert events[-1] == (None, "[DONE]")
    chunks = [event["choices"][0] for _, event in events[:-2]]
    assert "".join(chunk["delta"].get("content") or "" for chunk in chunks) == text
    assert chunks[-1]["finish_reason"] == reason
    seen = events[-2][1]
    assert set(seen) == SEEN
    assert seen["tokens"] == tokens
    assert (seen["protection"], seen["uniformity_p"], seen["recovered_text"]) == ("local", 0.25, "?!")
    assert (seen["recovered_fraction"], seen["noise_fraction"], seen["user_tokens"]) == (0.5, 0.125, 14)
    assert base64.b64decode(seen["picture"]) == LOOK.picture.pixels
    assert (seen["picture_of"], seen["picture_width"], seen["histogram"]) == ("qkv of layer 0", 4, list(range(256)))
    assert seen["histogram_expected"] == [1 / 256] * 256
    assert (seen["bytes_seen"], seen["calls"], seen["kept_bytes"], seen["checks"]) == (0, 0, 0, 0)
    assert seen["pads_left"] is None
    assert seen["seconds"] > 0


def test_the_chunks_are_those_of_the_chat_api() -> None:
    body = {"seed": 4, "stream_options": {"include_usage": True, "include_obfuscation": False}}
    chunks = [event for name, event in told(Script("Hi there"), **body) if name is None]

    async def chat() -> str:
        async with client_of(service_of(Script("Hi there"))) as client:
            return (await client.post("/v1/chat/completions", json={**BODY, **body})).text

    theirs = [event for _, event in named_events(asyncio.run(chat()))]
    for event in (*chunks[:-1], *theirs[:-1]):
        assert event.pop("id").startswith("chatcmpl-")
        assert event.pop("created") > 0
    assert chunks == theirs


@pytest.mark.parametrize(
    ("body", "param"),
    [({"stream": False}, "stream"), ({"stream": None}, "stream"), ({"n": 2}, "n"), ({"model": "other"}, "model")],
)
def test_only_one_streamed_answer_is_shown(body: dict[str, Any], param: str) -> None:
    script = Script("Hi")
    service = console_service(script)
    refused, answered = asked(service, body, {})
    assert refused.status_code in (400, 404)
    assert refused.json()["error"]["param"] == param
    assert answered.status_code == 200
    assert len(script.opened) == 1


def asked_expecting(service: Service, protection: str) -> httpx.Response:
    """The answer to a request that says at which protection it wants to be answered."""

    async def ask() -> httpx.Response:
        async with client_of(service) as client:
            return await client.post(URL, json=BODY, headers={"x-tsqp-expect-protection": protection})

    return asyncio.run(asyncio.wait_for(ask(), LIMIT_S))


@pytest.mark.parametrize("expected", ["masked", "Local", "local, masked", "", "canary"])
def test_a_message_for_another_protection_is_refused_before_anything_is_computed(expected: str) -> None:
    script, onlooker = Script("Hi"), ScriptedOnlooker()
    service = console_service(script, onlooker)
    refused = asked_expecting(service, expected)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "other_protection")
    assert refused.json()["error"]["message"] == "this server is at local, and another protection was expected"
    assert refused.headers["x-should-retry"] == "false"
    assert (script.opened, onlooker.looked) == ([], [])
    assert asked(service, {})[0].status_code == 200  # no watch was left behind


def test_a_message_for_this_protection_is_answered() -> None:
    script = Script("Hi")
    assert asked_expecting(console_service(script), "local").status_code == 200
    assert len(script.opened) == 1


def test_where_there_is_no_console_there_is_no_such_path() -> None:
    (answer,) = asked(service_of(Script("Hi")), {})
    assert answer.status_code == 404


TURNS = [
    {"role": "system", "content": "Say little."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": [{"type": "text", "text": "0x and x0"}]},
]


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (USER, "attack at dawn"),
        (TURNS, "0x and x0"),
        ([*TURNS, {"role": "assistant", "content": "0x and"}], "0x and x0"),
        ([{"role": "user", "content": "y" * 300}], "y" * MAX_TOKENS),
        ([{"role": "system", "content": "Say something."}], ""),
        ([{"role": "user", "content": ""}], ""),
    ],
    ids=["one turn", "the last of several", "an answer begun", "many tokens", "nobody", "nothing"],
)
def test_the_tokens_that_are_looked_for_are_those_of_the_users_last_message(
    messages: list[dict[str, Any]], text: str
) -> None:
    script, onlooker = Script("Hi"), ScriptedOnlooker()
    (answer,) = asked(console_service(script, onlooker), {"messages": messages})
    assert answer.status_code == 200
    ((tap, user),) = onlooker.looked
    assert script.tokenizer.decode(list(user)) == text
    (opened,) = script.opened
    assert opened.tap is tap
    wanted = tap._wanted
    assert opened.prompt[wanted.start : wanted.stop] == list(user)


def test_one_answer_at_a_time_is_looked_at() -> None:
    async def test() -> None:
        more = asyncio.Event()
        onlooker = ScriptedOnlooker()
        service = console_service(Script([104, more, 105], "Hi"), onlooker)
        onlooker.gate.clear()
        async with client_of(service) as client:

            async def refused() -> None:
                answer = await client.post(URL, json=BODY)
                assert (answer.status_code, answer.json()["error"]["code"]) == (429, "console_busy")
                assert answer.headers["retry-after"] == "1"

            first = Exchange(app_of(service), URL, BODY)
            assert await first.status() == 200
            await refused()
            more.set()
            while not onlooker.looked:
                await asyncio.sleep(0)
            await refused()
            onlooker.gate.set()
            await first.done
            assert (await client.post(URL, json=BODY)).status_code == 200
        assert len(onlooker.looked) == 2

    run(test)


def test_a_client_that_leaves_lets_go_of_what_was_seen_and_makes_room() -> None:
    async def test() -> None:
        script = Script([104, asyncio.Event()], "Hi")
        onlooker = ScriptedOnlooker()
        service = console_service(script, onlooker)
        exchange = Exchange(app_of(service), URL, BODY)
        assert await exchange.status() == 200
        tap = script.opened[0].tap
        assert tap is not None
        exchange.leave()
        await exchange.done
        assert tap._closed
        assert script.ended == [0]
        assert not onlooker.looked
        async with client_of(service) as client:
            assert (await client.post(URL, json=BODY)).status_code == 200

    run(test)


def test_a_look_that_nobody_waits_for_any_more_goes_on_to_its_end_alone() -> None:
    async def test() -> None:
        onlooker = ScriptedOnlooker()
        onlooker.gate.clear()
        service = console_service(Script("Hi"), onlooker)
        exchange = Exchange(app_of(service), URL, BODY)
        while not onlooker.looked:
            await asyncio.sleep(0)
        exchange.leave()
        await exchange.done
        async with client_of(service) as client:
            assert (await client.post(URL, json=BODY)).status_code == 429
            onlooker.gate.set()
            while (await client.post(URL, json=BODY)).status_code != 200:
                await asyncio.sleep(0)

    run(test)


def test_nothing_is_kept_of_an_answer_that_was_told() -> None:
    script, onlooker = Script("Hi"), ScriptedOnlooker()
    service = console_service(script, onlooker)
    asked(service, {})
    ((tap, _),) = onlooker.looked
    assert tap._closed
    gone = weakref.ref(tap)
    script.opened.clear()
    onlooker.looked.clear()
    del tap
    gc.collect()
    assert gone() is None


def test_what_is_refused_before_it_begins_makes_room() -> None:
    script = Script(QueueFull("full"), "Hi")
    first, second = asked(console_service(script), {}, {})
    assert (first.status_code, second.status_code) == (429, 200)
    assert first.json()["error"]["code"] == "queue_full"


def test_a_watch_that_was_lost_is_over() -> None:
    console = Console(console_service(Script("Hi")).console.taps, ScriptedOnlooker(), {})  # type: ignore[union-attr]
    console.watch([1, 2], range(1))
    gc.collect()
    assert console.watch([1, 2], range(1)).user == (1,)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ProductMismatch("canary"), "worker_cheated"),
        (WorkerLost("canary"), "worker_lost"),
        (ChannelClosed("canary"), "unavailable"),
        (ValueError("canary"), "internal_error"),
    ],
)
def test_an_error_is_the_last_event_and_nothing_is_seen(error: Exception, code: str) -> None:
    events = told(Script([104, error]))
    assert events[-1][1]["error"]["code"] == code
    assert [name for name, _ in events] == [None] * len(events)
    assert "canary" not in json.dumps(events)


def test_states_of_the_worker_are_told_when_they_change() -> None:
    async def test() -> None:
        more = asyncio.Event()
        script = Script([104, more, 105])
        script.worker_state = worker_state("ready", expelled={"tcp://old": "canary"})
        exchange = Exchange(app_of(console_service(script)), URL, {**BODY, **UNPADDED})
        assert await exchange.status() == 200
        names: list[str | None] = []
        states: list[dict[str, Any]] = []

        async def until_state() -> None:
            while True:
                for name, event in named_events((await exchange.body()).decode()):
                    names.append(name)
                    if name == "state":
                        states.append(event)
                        return

        script.worker_state = worker_state("reconnecting", losses=1, expelled={"tcp://old": "canary"})
        await until_state()
        script.worker_state = worker_state("ready", expelled={"tcp://old": "", "tcp://b": "canary"})
        await until_state()
        more.set()
        await exchange.done
        assert set(names) == {None, "state"}
        assert [(state["state"], state["expelled"]) for state in states] == [
            ("reconnecting", []),  # who was expelled before has no part in this answer
            ("ready", ["tcp://b"]),
        ]
        assert all(set(state) == {"state", "since_s", "expelled"} for state in states)

    run(test)


def test_a_state_that_is_not_ready_is_told_at_once_and_a_failed_one_before_its_error() -> None:
    script = Script([104, ProductMismatch("canary")])
    script.worker_state = worker_state("failed", failed_checks=1)
    events = told(script, **UNPADDED)
    assert events[0] == ("state", {"state": "failed", "since_s": 0.0, "expelled": []})
    assert events[-1][1]["error"]["code"] == "worker_cheated"


def test_without_a_change_no_state_is_told() -> None:
    script = Script("Hi")
    script.worker_state = worker_state("ready", expelled={"tcp://old": "canary"})
    assert "state" not in [name for name, _ in told(script)]


def test_it_is_counted_under_its_own_name_and_for_its_tenant() -> None:
    class Counting:
        began_at: list[str] = []  # noqa: RUF012

        def began(self, endpoint: str) -> None:
            self.began_at.append(endpoint)

        def __getattr__(self, _: str) -> Any:
            return lambda *_: None

    script, meters = Script("Hi"), Counting()

    async def test() -> None:
        await Exchange(app_of(console_service(script, metrics=meters)), URL, {**BODY, "cache_salt": "s"}).done

    run(test)
    assert meters.began_at == ["console"]
    assert (script.opened[0].tenant, script.opened[0].salt) == ("a tenant", "s")
