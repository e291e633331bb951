"""OpenAI's own client, strict about what it reads, against a real server with a real model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from tests.commands import LIMIT_S
from tests.server.conftest import Served
from tests.server.serving import NAME
from tsqp.api.async_llm import AsyncLLM

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
SEEDED: Any = {"model": NAME, "messages": MESSAGES, "seed": 5, "max_tokens": 24}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def client(server: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True) as client:
        yield client


@asynccontextmanager
async def async_client(server: Served) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


async def nothing_left(model: AsyncLLM) -> None:
    while model.counts().running or model.counts().waiting:
        await asyncio.sleep(0.001)


def test_chat_whole_and_as_a_stream(client: OpenAI) -> None:
    whole = client.chat.completions.create(**SEEDED)
    stream = client.chat.completions.create(**SEEDED, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert [chunk.usage for chunk in chunks if chunk.usage] == [whole.usage]
    assert whole.system_fingerprint == chunks[0].system_fingerprint == "tsqp-local-0123456789ab"


def test_the_helper_for_streams_collects_the_same(client: OpenAI) -> None:
    first = client.chat.completions.create(**SEEDED).choices[0].message.content
    assert first is not None
    asked: Any = {**SEEDED, "stop": [first[5:7]]}  # the helper takes an answer that was cut for an error
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.stream(**asked) as stream:
        collected = stream.get_final_completion()
    assert collected.choices[0].message.content == whole.choices[0].message.content
    assert collected.choices[0].finish_reason == whole.choices[0].finish_reason


def test_several_choices_are_told_apart(client: OpenAI) -> None:
    whole = client.chat.completions.create(**SEEDED, n=3)
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**SEEDED, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert [choice.message.content for choice in whole.choices] == texts
    assert len(set(texts)) == 3
    alone = client.chat.completions.create(**SEEDED)
    assert alone.choices[0].message.content == texts[0]


def test_a_seed_gives_the_same_in_company(server: Served) -> None:
    async def test() -> None:
        async with async_client(server) as client:

            async def text(seed: int) -> str | None:
                answer = await client.chat.completions.create(**{**SEEDED, "seed": seed})
                return answer.choices[0].message.content

            alone = [await text(seed) for seed in range(4)]
            assert await asyncio.gather(*(text(seed % 4) for seed in range(12))) == alone * 3
        await nothing_left(server.model)

    asyncio.run(test())


def test_a_tiny_temperature_is_the_likeliest(client: OpenAI) -> None:
    texts = {
        client.chat.completions.create(**{**SEEDED, "seed": None}, temperature=temperature).choices[0].message.content
        for temperature in (0, 1e-300, 1e-6)
    }
    assert len(texts) == 1


def test_penalties_count_the_answer_alone(client: OpenAI) -> None:
    """A token that is only in the prompt is as likely as it was; one that was chosen is not chosen again."""
    first = client.completions.create(model=NAME, prompt="abc", temperature=0, max_tokens=1)
    again: Any = {"model": NAME, "prompt": f"abc{first.choices[0].text}", "temperature": 0, "max_tokens": 1}
    plain = client.completions.create(**again)
    assert client.completions.create(**again, presence_penalty=2, frequency_penalty=2).choices[0].text == (
        plain.choices[0].text
    )
    biased: Any = {
        "model": NAME,
        "prompt": "abc",
        "temperature": 0,
        "max_tokens": 4,
        "logit_bias": {"64": 100, "65": 99},
    }
    assert client.completions.create(**biased).choices[0].text == "aaaa"
    assert client.completions.create(**biased, frequency_penalty=2).choices[0].text.startswith("ab")


def test_log_probabilities(client: OpenAI) -> None:
    asked: Any = {**SEEDED, "logprobs": True, "top_logprobs": 3}  # without a kept prefix, which changes bits at local
    whole = client.chat.completions.create(**asked, extra_body={"cache_salt": "whole"})
    entries = whole.choices[0].logprobs
    assert entries is not None
    assert entries.content is not None
    assert whole.usage is not None
    assert len(entries.content) == whole.usage.completion_tokens
    written = b"".join(bytes(entry.bytes or ()) for entry in entries.content)
    assert written.decode(errors="replace") == whole.choices[0].message.content
    for entry in entries.content:
        assert [top.logprob for top in entry.top_logprobs] == sorted(top.logprob for top in entry.top_logprobs)[::-1]
        assert len(entry.top_logprobs) == 3
        assert -9999.0 <= entry.logprob <= 0
    assert client.chat.completions.create(**SEEDED, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    streamed: list[Any] = []
    for chunk in client.chat.completions.create(**asked, stream=True, extra_body={"cache_salt": "streamed"}):
        streamed += (chunk.choices[0].logprobs and chunk.choices[0].logprobs.content) or []
    assert streamed == entries.content


def test_completions(client: OpenAI) -> None:
    asked: Any = {"model": NAME, "prompt": ["ab", "cd"], "seed": 2, "max_tokens": 12}
    whole = client.completions.create(**asked, echo=True)
    assert client.completions.create(**asked, logprobs=2).choices[0].logprobs is not None
    texts = ["", ""]
    with OpenAI(base_url=client.base_url, api_key="none") as lenient:  # the strict one has no type for these chunks
        for chunk in lenient.completions.create(**asked, echo=True, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
    assert [choice.text for choice in whole.choices] == texts
    assert whole.choices[0].text.startswith("ab")
    alone = client.completions.create(**{**asked, "prompt": list(b"cd")}).choices[0]
    assert alone.text != texts[1]  # bytes are no tokens' ids here
    assert client.completions.create(**{**asked, "prompt": "cd"}).choices[0].text == texts[1].removeprefix("cd")


class City(BaseModel):
    name: str
    large: bool


def test_forms_are_kept(client: OpenAI) -> None:
    bias = {"257": 60}  # end tokens where they are allowed
    parsed = client.chat.completions.parse(**{**SEEDED, "max_tokens": 400}, response_format=City, logit_bias=bias)
    if parsed.choices[0].finish_reason == "stop":
        assert parsed.choices[0].message.parsed is not None
    answer = client.chat.completions.create(
        **{**SEEDED, "max_tokens": 64}, response_format={"type": "json_object"}, temperature=0
    )
    text = answer.choices[0].message.content
    assert text is not None
    assert text.startswith("{")
    assert text.strip() == text


@pytest.mark.parametrize("schema", [{"type": "nothing"}, {"type": "object", "not": {}, "x-canary": 1}, {"anyOf": []}])
def test_a_form_that_is_none_is_refused_before_anything_begins(server: Served, client: OpenAI, schema: Any) -> None:
    before = server.model.counts().added
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**SEEDED, response_format=form, stream=stream)
        assert refused.value.param == "response_format"
        assert "canary" not in str(refused.value)
    assert server.model.counts().added == before


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_is_required_comes(client: OpenAI, choice: Any) -> None:
    asked: Any = {**SEEDED, "max_tokens": 300, "tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].finish_reason == ("tool_calls" if choice == "required" else "stop")
    calls: Any = whole.choices[0].message.tool_calls
    assert [call.function.name for call in calls] == ["weather"]
    assert calls[0].function.arguments in ('{"city":"Oslo"}', '{"city":"Rome"}')
    with client.chat.completions.stream(**asked) as stream:
        streamed: Any = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed[0].function.arguments == calls[0].function.arguments


def test_responses(client: OpenAI) -> None:
    asked: Any = {"model": NAME, "input": "Hello?", "max_output_tokens": 24, "temperature": 0}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    last: Any = events[-1]
    assert last.type == f"response.{whole.status}"
    assert last.response.output_text == whole.output_text
    assert last.response.usage == whole.usage
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    form: Any = {"format": {"type": "json_schema", "name": "x", "schema": {"enum": ["yes"]}}}
    with client.responses.stream(**asked, text=form) as stream:  # the helper takes an answer that was cut for none
        assert stream.get_final_response().output_text == '"yes"'


def test_responses_with_a_call_and_its_output(client: OpenAI) -> None:
    tool: Any = {"type": "function", **TOOL["function"], "strict": True}
    asked: Any = {"model": NAME, "tools": [tool], "max_output_tokens": 300, "parallel_tool_calls": False}
    first = client.responses.create(**asked, input="Weather?", tool_choice="required")
    (call,) = first.output
    assert call.type == "function_call"
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    turn: Any = [{"role": "user", "content": "Weather?"}, call.model_dump(), output]
    assert client.responses.create(**{**asked, "max_output_tokens": 8}, input=turn, tool_choice="none").output


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME, "tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_errors_have_their_classes(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**{**SEEDED, "model": "other"})
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(**{**SEEDED, "max_tokens": 10_000}, stream=True)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "max_tokens")
    for bad in ({"logit_bias": {"320": 1}}, {"extra_body": {"stop_token_ids": [320]}}):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**SEEDED, **bad)
        assert refused.value.param in ("logit_bias", "stop_token_ids")


def test_async_streams_run_side_by_side(server: Served) -> None:
    async def test() -> None:
        async with async_client(server) as client:

            async def text() -> str:
                stream = await client.chat.completions.create(**SEEDED, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            assert len(set(await asyncio.gather(*(text() for _ in range(8))))) == 1
        await nothing_left(server.model)

    asyncio.run(test())


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_that_is_left_ends_its_requests(server: Served, n: int) -> None:
    endless: Any = {**SEEDED, "max_tokens": 1900, "extra_body": {"ignore_eos": True}}

    async def test() -> None:
        before = server.model.counts().ended["abort"]
        async with async_client(server) as client:
            stream = await client.chat.completions.create(**endless, n=n, stream=True)
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
            await stream.close()
        await nothing_left(server.model)
        assert server.model.counts().ended["abort"] == before + n

    asyncio.run(asyncio.wait_for(test(), LIMIT_S))


def test_a_call_that_is_cancelled_ends_its_request(server: Served) -> None:
    endless: Any = {**SEEDED, "max_tokens": 1900, "extra_body": {"ignore_eos": True}}

    async def test() -> None:
        before = server.model.counts()
        async with async_client(server) as client:
            task = asyncio.create_task(client.chat.completions.create(**endless))
            while server.model.counts().added == before.added:
                await asyncio.sleep(0.001)
            task.cancel()
        await nothing_left(server.model)
        assert server.model.counts().ended["abort"] == before.ended["abort"] + 1

    asyncio.run(asyncio.wait_for(test(), LIMIT_S))


def test_a_conversation_that_goes_on_is_answered_as_without_what_was_kept(server: Served, client: OpenAI) -> None:
    first = client.chat.completions.create(**SEEDED, extra_body={"cache_salt": "kept"})
    turns = [*MESSAGES, {"role": "assistant", "content": first.choices[0].message.content}, MESSAGES[1]]
    asked: Any = {**SEEDED, "messages": turns}
    before = server.model.counts().found_tokens
    hit = client.chat.completions.create(**asked, extra_body={"cache_salt": "kept"})
    found = server.model.counts().found_tokens
    miss = client.chat.completions.create(**asked, extra_body={"cache_salt": "other"})
    assert found > before
    assert server.model.counts().found_tokens == found
    assert hit.choices[0].message.content == miss.choices[0].message.content
