"""Two ways to put load on a server: a number of clients that wait for their answers, or strangers who do not wait.

In a closed loop a server that is slow is asked less. In an open one requests come when they come, at moments that were
drawn before, and what a slow server is not done with piles up. The clock is that of the asyncio loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from tsqp.bench.latency import Answer

T = TypeVar("T")
Prompt = list[int]
Ask = Callable[[Prompt, float], Coroutine[Any, Any, Answer]]  # a prompt, and when it was meant to be asked

BYTES = 256  # token ids below, which every vocabulary has
START_S = 0.05  # from the call to the first moment that counts: tasks are there by then


def prompts(tokens: int, seed: int) -> Iterator[Prompt]:
    """Prompts without end that share no beginning, so that no cache of a server helps; the same ones for one seed."""
    dice = np.random.default_rng(seed)
    while True:
        yield dice.integers(0, BYTES, tokens).tolist()


def arrival_times(rate: float, seconds: float, seed: int) -> list[float]:
    """A Poisson process of ``rate`` a second: moments before ``seconds``, in order, one at least."""
    dice = np.random.default_rng(seed)
    moments, at = list[float](), float(dice.exponential(1 / rate))
    while at < seconds or not moments:
        moments.append(at)
        at += float(dice.exponential(1 / rate))
    return moments


async def closed_loop(
    ask: Ask, asked: Iterator[Prompt], streams: int, seconds: float, most: int | None = None
) -> tuple[list[Answer], float, float]:
    """``streams`` clients, each asking again once it has its answer, for ``seconds``, and once at least.

    No more than ``most`` answers in all. Returns them, and from when until when all clients were at it.
    """
    clock = asyncio.get_running_loop().time
    left, answers, stopped = islice(asked, most), list[Answer](), list[float]()
    start = clock()

    async def client() -> None:
        for prompt in left:
            answers.append(await ask(prompt, clock()))
            if clock() - start >= seconds:
                break
        stopped.append(clock())

    await _together(client() for _ in range(streams))
    return answers, start, min(stopped)


async def open_loop(ask: Ask, asked: Iterator[Prompt], moments: Sequence[float]) -> tuple[list[Answer], float, float]:
    """A request at each of the ``moments``, in seconds after the start, whatever became of those before.

    Returns the answers, the start, and when the last one had ended.
    """
    clock = asyncio.get_running_loop().time
    start = clock() + START_S

    async def request(prompt: Prompt, meant: float) -> Answer:
        await asyncio.sleep(meant - clock())
        return await ask(prompt, meant)

    answers = await _together(request(next(asked), start + moment) for moment in moments)
    return answers, start, clock()


async def _together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What each of them returns; the first exception ends the others, and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as several:
        raise several.exceptions[0] from None
    return [task.result() for task in tasks]
