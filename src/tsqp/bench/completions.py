"""A client of the completions API, ours or another server's, that notes when each piece of an answer came."""

from __future__ import annotations

import asyncio
import json
from types import TracebackType
from typing import Any

import httpx

from tsqp.bench.latency import REFUSED, SERVED, Answer
from tsqp.errors import WorkerFailed

DATA, DONE = "data: ", "[DONE]"
SHOWN = 300  # characters of what a server says of a failure
PATIENCE_S = 600.0  # for the next bytes of an answer: a server under load is slow, and not to be given up


class CompletionsClient:
    """``address``: of the server, without a path; ``name``: what it is called in errors.

    ``count``: tokens of each answer, the likeliest each time. ``more``: fields of a request that this
    server alone knows. A context manager.
    """

    def __init__(self, name: str, address: str, model: str, count: int, more: dict[str, Any] | None = None) -> None:
        self._name = name
        self._body = {
            "model": model,
            "max_tokens": count,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **(more or {}),
        }
        # No bound on connections: what a client holds back, a server would not be blamed for. No proxy between us.
        # No connection is used again: llama.cpp's server ends one now and then, just as the next request is sent.
        self._http = httpx.AsyncClient(
            base_url=address,
            trust_env=False,
            timeout=httpx.Timeout(PATIENCE_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )
        self._count = count

    async def ask(self, prompt: list[int], asked_s: float) -> Answer:
        """One answer, read to its end. ``asked_s``: when it was meant to be asked, by the loop's clock.

        Raises WorkerFailed for an answer that failed or has another length.
        """
        clock = asyncio.get_running_loop().time
        arrived, tokens = list[float](), 0
        try:
            async with self._http.stream("POST", "/v1/completions", json={**self._body, "prompt": prompt}) as reply:
                if reply.status_code in REFUSED:
                    return Answer(asked_s, reply.status_code)
                if reply.status_code != SERVED:
                    raise self._failed((await reply.aread()).decode(errors="replace"))
                async for line in reply.aiter_lines():
                    if not line.startswith(DATA) or line.endswith(DONE):
                        continue  # between events; a comment; the end
                    now, event = clock(), json.loads(line.removeprefix(DATA))
                    if "error" in event:
                        raise self._failed(str(event["error"]))
                    if event["choices"]:
                        arrived.append(now)
                    tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        except httpx.HTTPError as error:
            raise self._failed(f"{type(error).__name__}: {error}") from error
        if tokens != self._count or not arrived:
            raise self._failed(f"an answer has {tokens} tokens instead of {self._count}")
        return Answer(asked_s, SERVED, tuple(arrived), tokens)

    async def __aenter__(self) -> CompletionsClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    def _failed(self, what: str) -> WorkerFailed:
        return WorkerFailed(f"the server that was measured ({self._name}) failed: {what[:SHOWN]}")
