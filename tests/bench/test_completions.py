"""The client of a measured server: what it asks, what it counts, and what it takes for a failure."""

from __future__ import annotations

import asyncio
import socket

import pytest

from tests.bench.completions_server import Script, piece, speaking, usage
from tsqp.bench.completions import CompletionsClient
from tsqp.bench.latency import Answer
from tsqp.errors import WorkerFailed

DONE = "data: [DONE]"


def asking(script: Script, count: int = 3) -> CompletionsClient:
    return CompletionsClient("one", script.address, "a model", count, {"cache_prompt": False})


def answer_of(script: Script, count: int = 3) -> Answer:
    """What the client makes of it."""

    async def ask() -> Answer:
        async with asking(script, count) as client:
            return await client.ask([5, 6, 7], -1.0)

    with speaking(script):
        return asyncio.run(ask())


def test_pieces_are_timed_and_tokens_are_those_that_the_server_counts() -> None:
    script = Script(lines=[": keep-alive", piece("a"), piece("bc"), usage(3), DONE])
    answer = answer_of(script)
    assert (answer.asked_s, answer.status, answer.tokens, len(answer.arrived_s)) == (-1.0, 200, 3, 2)
    assert list(answer.arrived_s) == sorted(answer.arrived_s)
    assert script.asked == [
        {
            "model": "a model",
            "prompt": [5, 6, 7],
            "max_tokens": 3,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "cache_prompt": False,
        }
    ]


def test_usage_may_come_with_the_last_piece_and_be_null_before() -> None:
    lines = [piece("a", usage=None), piece("b", usage={"completion_tokens": 3}), DONE]
    assert answer_of(Script(lines=lines)).tokens == 3


@pytest.mark.parametrize("status", [429, 503])
def test_a_refusal_is_an_outcome(status: int) -> None:
    answer = answer_of(Script(status, ['{"error": {"message": "come again"}}']))
    assert answer == Answer(-1.0, status)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (Script(400, ['{"error": {"message": "no such field"}}']), "no such field"),
        (Script(lines=[piece("a"), 'data: {"error": {"message": "the worker was lost"}}']), "the worker was lost"),
        (Script(lines=[piece("a"), usage(2), DONE]), "2 tokens instead of 3"),
        (Script(lines=[piece("a")]), "0 tokens instead of 3"),
    ],
)
def test_everything_else_is_a_failure(script: Script, words: str) -> None:
    with pytest.raises(WorkerFailed, match=words):
        answer_of(script)


def test_a_server_that_is_not_there_is_a_failure() -> None:
    async def ask() -> Answer:
        async with asking(script) as client:
            return await client.ask([1], 0.0)

    with socket.socket() as taken:  # at which nobody listens, as long as it is there
        taken.bind(("127.0.0.1", 0))
        script = Script(address=f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(WorkerFailed, match="ConnectError"):
            asyncio.run(ask())


def test_no_connection_is_used_twice() -> None:
    """llama.cpp's server says that it keeps one, and ends it."""
    script = Script(lines=[piece("a"), usage(3), DONE])

    async def ask() -> None:
        async with asking(script) as client:
            for _ in range(3):
                await client.ask([1], 0.0)

    with speaking(script):
        asyncio.run(ask())
    assert len(set(script.clients)) == 3
