"""A server of a tiny model, one for all tests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.server.chat_model import chat_model
from tests.server.serving import served, service_of
from tsqp.api.async_llm import AsyncLLM
from tsqp.api.config import ComputeConfig
from tsqp.api.llm import LLM
from tsqp.server.service import Service


@dataclass(frozen=True)
class Served:
    """``url``: where the server is. ``model``: what answers there; no test may leave a request in it."""

    url: str
    model: AsyncLLM
    service: Service


@pytest.fixture(scope="session")
def server() -> Iterator[Served]:
    """A real server with a real, tiny model."""
    model = AsyncLLM(LLM(str(chat_model()), protection="local", compute=ComputeConfig(dtype="float32")))
    service = service_of(model)
    with served(service) as url:
        yield Served(url, model, service)
    asyncio.run(model.close(0))
