"""``benchmarks.attestation``: an answer begins with its first text, not with the event that names who speaks."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
from benchmarks import attestation

ROLE_S = 0.05


def event(**delta: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n"


class Answer(httpx.AsyncByteStream):
    """Its role at once, its text later."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield event(role="assistant", content="")
        await asyncio.sleep(ROLE_S)
        yield event(content="Rivers")
        yield event(content=' "content"')
        yield event()
        yield b'data: {"choices": [], "usage": {}}\n\ndata: [DONE]\n\n'


def test_the_event_with_the_role_is_no_token() -> None:
    async def asked() -> tuple[float, int]:
        transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=Answer()))
        async with httpx.AsyncClient(transport=transport) as client:
            return await attestation.stream(client, "http://server/v1", "m", 2)

    start = time.perf_counter()
    first_s, count = asyncio.run(asked())
    assert ROLE_S <= first_s <= time.perf_counter() - start
    assert count == 2
