"""instructor: an object of a pydantic model, by each of the ways it has with OpenAI."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Literal

import instructor
import pytest
from instructor import Mode
from instructor.core.exceptions import IncompleteOutputException
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from conformance.target import Target

MODES = (Mode.TOOLS, Mode.TOOLS_STRICT, Mode.JSON_SCHEMA, Mode.RESPONSES_TOOLS)


class City(BaseModel):
    city: Literal["Oslo", "Rome"]
    large: bool


def asked(target: Target, mode: Mode) -> dict[str, Any]:
    bound = "max_output_tokens" if mode is Mode.RESPONSES_TOOLS else "max_tokens"
    return {
        "model": target.model,
        "messages": [{"role": "user", "content": "Which city?"}],
        "temperature": 0,
        bound: 300,
        "max_retries": 0,
    }


@pytest.mark.parametrize("mode", MODES)
def test_an_object(target: Target, mode: Mode) -> None:
    client = instructor.from_openai(OpenAI(base_url=target.api, api_key=target.key, max_retries=0), mode=mode)
    city, raw = client.create_with_completion(response_model=City, **asked(target, mode))
    assert isinstance(city, City)
    assert raw.usage.total_tokens > 0


@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.JSON_SCHEMA])
def test_an_object_piece_by_piece(target: Target, mode: Mode) -> None:
    client = instructor.from_openai(OpenAI(base_url=target.api, api_key=target.key, max_retries=0), mode=mode)
    whole = client.create(response_model=City, **asked(target, mode))
    pieces = list(client.create_partial(response_model=City, **asked(target, mode)))
    assert pieces[-1].model_dump() == whole.model_dump()


async def _of_async(target: Target) -> City:
    async with AsyncOpenAI(base_url=target.api, api_key=target.key, max_retries=0) as plain:
        client = instructor.from_openai(plain, mode=Mode.TOOLS)
        return await client.create(response_model=City, **asked(target, Mode.TOOLS))


def test_with_asyncio(target: Target) -> None:
    assert isinstance(asyncio.run(_of_async(target)), City)


def test_an_answer_that_was_cut_is_told_as_that(target: Target) -> None:
    """The model may call; this one, whose weights are random, writes to its bound."""
    client = instructor.from_openai(
        OpenAI(base_url=target.api, api_key=target.key, max_retries=0), mode=Mode.PARALLEL_TOOLS
    )
    with pytest.raises(IncompleteOutputException):
        client.create(response_model=Iterable[City], **asked(target, Mode.PARALLEL_TOOLS))
