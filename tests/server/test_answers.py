"""Answers over a real engine: what is counted adds up, and who leaves leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.commands import LIMIT_S
from tests.server.chat_model import chat_model
from tests.server.serving import NAME, Exchange, Script, app_of, client_of, events_of, service_of
from tsqp import LLM, AsyncLLM, ComputeConfig, Limits

ENDLESS = {
    "model": NAME,
    "messages": [{"role": "user", "content": "Hi"}],
    "ignore_eos": True,
    "max_tokens": 1900,
    "stream": True,
}
CHAT = "/v1/chat/completions"


class Log:
    """Meters that keep what they are told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def began(self, endpoint: str) -> None:
        self.told.append(("began", endpoint))

    def first_token(self, seconds: float) -> None:
        assert seconds >= 0
        self.told.append(("first",))

    def token(self, seconds: float) -> None:
        assert seconds >= 0
        self.told.append(("token",))

    def ended(self, reason: str, prompt_tokens: int, completion_tokens: int, seconds: float) -> None:
        assert seconds >= 0
        self.told.append(("ended", reason, prompt_tokens, completion_tokens))


def with_model(test: Callable[[AsyncLLM], Coroutine[Any, Any, None]], limits: Limits | None = None) -> None:
    async def run() -> None:
        llm = LLM(str(chat_model()), protection="local", compute=ComputeConfig(dtype="float32"), limits=limits)
        async with AsyncLLM(llm) as model:
            await test(model)

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))


async def nothing_left(model: AsyncLLM) -> None:
    while model.counts().running or model.counts().waiting:
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [False, True])
def test_the_meters_are_told_of_each_answer(stream: bool) -> None:
    log = Log()

    async def test() -> None:
        async with client_of(service_of(Script("abc", "x"), metrics=log)) as client:
            body = {"model": NAME, "prompt": [[1, 2], [3]], "max_tokens": 3, "stream": stream}
            await client.post("/v1/completions", json=body)

    asyncio.run(test())
    assert log.told[:2] == [("began", "completions")] * 2
    assert sorted(log.told) == sorted(
        [
            *[("began", "completions")] * 2,
            *[("first",)] * 2,
            *[("token",)] * 3,  # and the end token of the second one
            ("ended", "length", 2, 3),
            ("ended", "stop", 1, 1),
        ]
    )


@pytest.mark.parametrize("stream", [False, True])
def test_choices_compute_their_prompt_once(stream: bool) -> None:
    async def test(model: AsyncLLM) -> None:
        body = {**ENDLESS, "max_tokens": 5, "n": 4, "stream": stream}
        async with client_of(service_of(model)) as client:
            assert (await client.post(CHAT, json=body)).status_code == 200
        counts = model.counts()
        assert counts.ended["length"] == 4
        assert counts.found_tokens == 3 * (counts.prompt_tokens - 3 - 1) > 3 * 16

    with_model(test)


def test_who_leaves_the_queue_is_out_of_it_and_the_next_is_served() -> None:
    async def test(model: AsyncLLM) -> None:
        log = Log()
        app = app_of(service_of(model, metrics=log))
        first = Exchange(app, CHAT, ENDLESS)
        await first.status()
        await first.event()
        waiting = [Exchange(app, CHAT, {**ENDLESS, "stream": stream}) for stream in (True, False)]
        while model.counts().waiting < 2:
            await asyncio.sleep(0.001)
        refused = Exchange(app, CHAT, ENDLESS)
        assert await refused.status() == 429
        for one in (*waiting, first):
            one.leave()
            await one.done
        await nothing_left(model)
        assert (model.counts().ended["abort"], model.counts().kv_bytes) == (3, 0)
        last = Exchange(app, CHAT, {**ENDLESS, "max_tokens": 2})
        assert await last.status() == 200
        await last.done
        reasons = [told[1] for told in log.told if told[0] == "ended"]
        assert reasons == ["abort"] * 3 + ["length"]

    with_model(test, Limits(running=1, waiting=2))


def test_who_leaves_during_a_long_prompt_frees_it() -> None:
    async def test(model: AsyncLLM) -> None:
        app = app_of(service_of(model))
        long = {**ENDLESS, "messages": [{"role": "user", "content": "x" * 1500}], "max_tokens": 9}
        running = Exchange(app, CHAT, ENDLESS)  # beside it the prompt is computed in parts
        await running.status()
        for _ in range(3):
            await running.event()
        prompt = Exchange(app, CHAT, {**long, "stream": False})
        while model.counts().running < 2:
            await asyncio.sleep(0)
        prompt.leave()
        await prompt.done
        running.leave()
        await running.done
        await nothing_left(model)
        assert model.counts().ended["abort"] == 2
        assert model.counts().prompt_tokens < 1500

    with_model(test, Limits(prefill_rows=4))


def test_a_model_that_is_closed_says_so_in_the_streams_that_are_open() -> None:
    async def test(model: AsyncLLM) -> None:
        app = app_of(service_of(model))
        exchange = Exchange(app, CHAT, ENDLESS)
        await exchange.status()
        for _ in range(3):
            await exchange.event()
        await model.close(0)
        events = [await exchange.event()]
        while "error" not in events[-1]:
            events.append(await exchange.event())
        assert events[-1]["error"]["code"] == "unavailable"
        await exchange.done
        async with client_of(service_of(model)) as client:
            answer = await client.post(CHAT, json=ENDLESS)
        assert answer.status_code == 503
        assert events_of(answer.text) == []

    with_model(test)
