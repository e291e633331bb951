"""pydantic-ai: agents with tools and typed results, over chat and over responses."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent, ModelSettings, NativeOutput, ToolOutput, UsageLimits
from pydantic_ai.direct import model_request
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.messages import ModelMessage, ModelRequest, ToolCallPart
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.tools import ToolDefinition

from conformance.target import Target

KINDS = [OpenAIChatModel, OpenAIResponsesModel]
LIMITS = UsageLimits(request_limit=60)


class City(BaseModel):
    city: Literal["Oslo", "Rome"]
    large: bool


def model_of(target: Target, kind: Any, **changes: str) -> Any:
    said = {"name": target.model, "key": target.key, **changes}
    client = AsyncOpenAI(base_url=target.api, api_key=said["key"], max_retries=0)
    return kind(said["name"], provider=OpenAIProvider(openai_client=client))


@pytest.mark.parametrize("kind", KINDS)
def test_text_whole_and_as_a_stream(target: Target, kind: Any) -> None:
    async def run() -> None:
        agent = Agent(
            model_of(target, kind), instructions="Be brief.", model_settings=ModelSettings(temperature=0, max_tokens=24)
        )
        whole = await agent.run("Hello?")
        async with agent.run_stream("Hello?") as stream:
            assert await stream.get_output() == whole.output
            used = stream.usage() if callable(stream.usage) else stream.usage
        told = whole.usage() if callable(whole.usage) else whole.usage
        assert (used.input_tokens, used.output_tokens) == (told.input_tokens, told.output_tokens)
        assert told.input_tokens > 0
        again = await agent.run("And now?", message_history=whole.all_messages())
        assert again.output is not None

    asyncio.run(run())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [ToolOutput, NativeOutput])
def test_a_typed_result(target: Target, kind: Any, way: Any) -> None:
    async def run() -> None:
        agent = Agent(
            model_of(target, kind),
            output_type=way(City),
            model_settings=ModelSettings(temperature=0, max_tokens=300),
        )
        whole = await agent.run("Which city?")
        assert isinstance(whole.output, City)
        async with agent.run_stream("Which city?") as stream:
            assert await stream.get_output() == whole.output

    asyncio.run(run())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [ToolOutput, NativeOutput])
def test_a_typed_result_after_tools(target: Target, kind: Any, way: Any) -> None:
    """The model chooses by chance between the tool and the result, so with a seed of each request it gets there."""
    called: list[str] = []

    async def run() -> Any:
        agent = Agent(
            model_of(target, kind),
            output_type=way(City),
            model_settings=ModelSettings(temperature=1, max_tokens=300),
        )

        @agent.tool_plain
        def weather(city: Literal["Oslo", "Rome"]) -> str:
            """The weather of a city."""
            called.append(city)
            return "clear"

        return (await agent.run("Which city is sunny?", usage_limits=LIMITS)).output

    assert isinstance(asyncio.run(run()), City)
    assert all(city in ("Oslo", "Rome") for city in called)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tools_that_may_be_called_can_be_narrowed(target: Target, kind: Any) -> None:
    """Over responses this is ``allowed_tools``."""
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    parameters = ModelRequestParameters(
        function_tools=[ToolDefinition(name=name, parameters_json_schema=schema) for name in ("one", "two", "three")],
        allow_text_output=True,
    )
    settings = ModelSettings(temperature=1, max_tokens=200, parallel_tool_calls=False, tool_choice=["one", "two"])
    messages: list[ModelMessage] = [ModelRequest.user_text_prompt("Go on.")]

    async def run() -> list[str]:
        model = model_of(target, kind)
        answers = [
            await model_request(model, messages, model_settings=settings, model_request_parameters=parameters)
            for _ in range(6)
        ]
        return [part.tool_name for answer in answers for part in answer.parts if isinstance(part, ToolCallPart)]

    called = asyncio.run(run())
    assert len(called) == 6
    assert set(called) <= {"one", "two"}


@pytest.mark.parametrize("kind", KINDS)
def test_errors_tell_their_status(target: Target, kind: Any) -> None:
    async def status(settings: ModelSettings, **changes: str) -> int:
        agent = Agent(model_of(target, kind, **changes), model_settings=settings)
        with pytest.raises(ModelHTTPError) as refused:
            await agent.run("Hello?")
        return int(refused.value.status_code)

    fine = ModelSettings(max_tokens=8)
    assert asyncio.run(status(fine, key="wrong")) == 401
    assert asyncio.run(status(fine, name="other")) == 404
    assert asyncio.run(status(ModelSettings(max_tokens=100_000))) == 400
