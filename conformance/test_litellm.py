"""litellm, as a library: it takes this server for OpenAI at another address."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import litellm
import pytest
from pydantic import BaseModel

from conformance.target import Target

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
WEATHER = {
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


class City(BaseModel):
    city: Literal["Oslo", "Rome"]
    large: bool


@pytest.fixture
def asked(target: Target) -> dict[str, Any]:
    return {
        "model": f"openai/{target.model}",
        "api_base": target.api,
        "api_key": target.key,
        "messages": MESSAGES,
        "seed": 5,
        "max_tokens": 24,
        "num_retries": 0,
    }


def test_chat_whole_and_as_a_stream(asked: dict[str, Any]) -> None:
    whole = litellm.completion(**asked)
    chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    built = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    assert built.choices[0].message.content == whole.choices[0].message.content
    assert built.choices[0].finish_reason == whole.choices[0].finish_reason
    assert built.usage.total_tokens == whole.usage.total_tokens > 0


def test_many_at_once(asked: dict[str, Any]) -> None:
    async def texts() -> list[str]:
        answers = await asyncio.gather(*(litellm.acompletion(**asked) for _ in range(8)))
        return [answer.choices[0].message.content for answer in answers]

    assert len(set(asyncio.run(texts()))) == 1


def test_a_stream_that_is_left_ends_on_the_server(target: Target, asked: dict[str, Any]) -> None:
    before = target.aborted()

    async def leave() -> None:
        endless = {**asked, "max_tokens": 1900, "extra_body": {"ignore_eos": True}}
        stream = await litellm.acompletion(**endless, stream=True)
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        await stream.aclose()

    asyncio.run(leave())
    target.wait_idle()
    assert target.aborted() == before + 1


def test_a_call_that_must_come(asked: dict[str, Any]) -> None:
    asked |= {"max_tokens": 300, "tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    whole = litellm.completion(**asked)
    (call,) = whole.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    assert whole.choices[0].finish_reason == "tool_calls"
    built = litellm.stream_chunk_builder(list(litellm.completion(**asked, stream=True)))
    assert [one.function for one in built.choices[0].message.tool_calls] == [call.function]
    turn = [*MESSAGES, whole.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert litellm.completion(**{**asked, "messages": turn, "tool_choice": "none"}).usage.completion_tokens > 0


def test_a_form_is_kept(asked: dict[str, Any]) -> None:
    answer = litellm.completion(**{**asked, "max_tokens": 300}, response_format=City)
    City.model_validate_json(answer.choices[0].message.content)


def test_log_probabilities(asked: dict[str, Any]) -> None:
    choice = litellm.completion(**asked, logprobs=True, top_logprobs=2).choices[0]
    assert len(choice.logprobs.content) > 0
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)


def test_completions(target: Target, asked: dict[str, Any]) -> None:
    asked |= {"model": f"text-completion-openai/{target.model}", "prompt": "abc"}
    del asked["messages"]
    assert litellm.text_completion(**asked).choices[0].text
    assert "".join(chunk.choices[0].text or "" for chunk in litellm.text_completion(**asked, stream=True))


def test_responses(asked: dict[str, Any]) -> None:
    asked |= {"input": "Hello?", "max_output_tokens": 24, "temperature": 0}
    for name in ("messages", "max_tokens", "seed"):
        del asked[name]
    whole = litellm.responses(**asked)
    text = "".join(event.delta for event in litellm.responses(**asked, stream=True) if "text.delta" in event.type)
    assert text == whole.output[0].content[0].text


def test_errors_have_their_classes(target: Target, asked: dict[str, Any]) -> None:
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**{**asked, "api_key": "wrong"})
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**asked, "model": "openai/other"})
    with pytest.raises(litellm.ContextWindowExceededError):  # a router sends it to a model with a longer context
        litellm.completion(**{**asked, "max_tokens": 100_000})
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**{**asked, "messages": [{"role": "user", "content": "x" * 4000}]})
    with pytest.raises(litellm.BadRequestError) as refused:
        litellm.completion(**{**asked, "temperature": 3})
    assert not isinstance(refused.value, litellm.ContextWindowExceededError)
