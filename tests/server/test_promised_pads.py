"""A server that refuses without pads: what can never fit is no matter of another time, and defaults fit."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.server.chat_model import CONTEXT, chat_model
from tests.server.serving import NAME, Script, client_of, service_of
from tests.trusted.guard.hostile import serve
from tsqp import LLM, GuardConfig, SamplingParams
from tsqp.api.async_llm import AsyncLLM

AHEAD = 256
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/responses": {"input": "hi"},
    "/v1/completions": {"prompt": [1, 2, 3]},
}
BOUNDS = {"/v1/responses": "max_output_tokens"}


def scripted(path: str, promised: int | None, **fields: Any) -> list[tuple[int, int]]:
    """Tokens of the prompt and at most of the answer, of each choice that a model is asked for."""
    script = Script("a")
    script.llm.most_promised = promised

    async def test() -> int:
        async with client_of(service_of(script)) as client:
            answer = await client.post(path, json={"model": NAME, **BODIES[path], **fields})
        return answer.status_code

    assert asyncio.run(test()) == 200
    return [(len(one.prompt), one.params.max_tokens) for one in script.opened]


@pytest.mark.parametrize("path", list(BODIES))
def test_an_answer_without_a_length_is_as_long_as_pads_can_be_promised(path: str) -> None:
    """The last token of an answer crosses no layer, so it needs none."""
    ((prompt, unbounded),) = scripted(path, None)
    assert unbounded == (16 if path == "/v1/completions" else CONTEXT - prompt)
    assert scripted(path, prompt + 4) == [(prompt, 5)]
    assert scripted(path, prompt - 1) == [(prompt, 1)], "the engine says that this cannot be"
    assert scripted(path, prompt + 4, **{BOUNDS.get(path, "max_tokens"): 9}) == [(prompt, 9)], "never less in silence"


def test_several_choices_share_what_can_be_promised() -> None:
    ((prompt, _),) = scripted("/v1/completions", None)
    assert scripted("/v1/completions", 3 * (prompt + 4), n=3) == [(prompt, 5)] * 3


def test_choices_that_never_fit_together_are_not_to_be_asked_again() -> None:
    """Each alone would fit, and the first would be begun in vain."""
    script = Script("a")
    script.llm.most_promised = 24

    async def test(n: int) -> httpx.Response:
        async with client_of(service_of(script)) as client:
            body = {"model": NAME, **BODIES["/v1/completions"], "n": n, "max_tokens": 10}
            return await client.post("/v1/completions", json=body)

    assert asyncio.run(test(2)).status_code == 200
    opened = len(script.opened)
    answer = asyncio.run(test(3))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert answer.headers["x-should-retry"] == "false"
    assert len(script.opened) == opened


@pytest.fixture(scope="module")
def told() -> dict[str, httpx.Response]:
    """What a masked server says to a request without a length, to one that fits never, and to one that fits later."""
    guard = GuardConfig(pads_ahead=AHEAD, pads_empty="refuse", warm_pads=True)
    found = {}

    async def test(model: AsyncLLM) -> None:
        async with client_of(service_of(model)) as client:
            for path, body in BODIES.items():
                filler = model.llm.guard.filler if model.llm.guard is not None else None
                assert filler is not None
                filler.fill()
                found[path] = await client.post(path, json={"model": NAME, **body})
            path = "/v1/completions"
            body = {"model": NAME, **BODIES[path]}
            found["never"] = await client.post(path, json={**body, "max_tokens": AHEAD + 20})
            async with await model.open([1, 2, 3], SamplingParams(max_tokens=200)):
                found["later"] = await client.post(path, json={**body, "max_tokens": AHEAD - 10})

    async def run(llm: LLM) -> None:
        async with AsyncLLM(llm) as model:
            await test(model)

    with serve(str(chat_model())) as (_, address):
        llm = LLM(str(chat_model()), protection="masked", worker=address, guard=guard)
        asyncio.run(run(llm))
    return found


@pytest.mark.parametrize("path", list(BODIES))
def test_a_request_without_a_length_is_answered(told: dict[str, httpx.Response], path: str) -> None:
    assert told[path].status_code == 200, told[path].text


def test_what_can_never_fit_is_not_to_be_asked_again(told: dict[str, httpx.Response]) -> None:
    error = told["never"].json()["error"]
    assert (told["never"].status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "max_tokens")
    assert "retry-after" not in told["never"].headers
    assert told["never"].headers["x-should-retry"] == "false"


def test_what_fits_later_is(told: dict[str, httpx.Response]) -> None:
    assert (told["later"].status_code, told["later"].json()["error"]["code"]) == (503, "pads_exhausted")
    assert told["later"].headers["x-should-retry"] == "true"
