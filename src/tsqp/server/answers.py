"""The answers of one request: opened together before anything is sent, measured, and ended with the request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from tsqp.errors import ChannelClosed
from tsqp.server.errors import too_few_pads
from tsqp.server.meters import Meters, Reason
from tsqp.server.service import Service

if TYPE_CHECKING:
    from tsqp.api.answer import Delta, Ends
    from tsqp.api.async_llm import AsyncAnswer
    from tsqp.trusted.engine.sampling_params import SamplingParams
    from tsqp.trusted.tap import Tap

T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """A prompt and how it is to be answered.

    ``tap``: for what is sent to the worker meanwhile. ``lora``: the adapter that answers. ``ends``: says of this answer
    alone when it has ended. ``goes_on``: with the text of the prompt; else the answer is a turn of its own.
    """

    prompt: list[int]
    params: SamplingParams
    tap: Tap | None = None
    lora: str | None = None
    ends: Ends | None = None
    goes_on: bool = False


def _rows(asked: Asked) -> int:
    """Rows for which pads are promised: the last token of an answer crosses no layer."""
    return len(asked.prompt) + asked.params.max_tokens - 1


class Answers:
    """Answers to one request, all of them in the engine's queue.

    A context manager: what has not ended then is aborted.
    """

    def __init__(self) -> None:
        self._under_way: list[_UnderWay] = []

    @classmethod
    async def open(
        cls, service: Service, request: Request, endpoint: str, asked: Sequence[Asked], salt: str | None
    ) -> Answers:
        """Put them into the queue: all, or none. Raises as ``AsyncLLM.open``."""
        promised = service.model.llm.most_promised
        if promised is not None and len(asked) > 1 and sum(map(_rows, asked)) > promised:
            raise too_few_pads()
        tenant = getattr(request.state, "tenant", "")
        answers = cls()
        try:
            for one in asked:
                answer = await service.model.open(
                    one.prompt,
                    one.params,
                    tenant=tenant,
                    salt=salt,
                    tap=one.tap,
                    lora=one.lora,
                    ends=one.ends,
                    goes_on=one.goes_on,
                )
                answers._under_way.append(_UnderWay(answer, service.metrics, endpoint))
        except BaseException:
            answers.close()
            raise
        return answers

    async def pieces(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """The pieces of all answers as they come, each with the place of its answer. Raises what has ended one."""
        arrived: asyncio.Queue[tuple[int, Delta] | Exception | None] = asyncio.Queue()  # None: one has ended
        tasks = [asyncio.create_task(one.read(index, arrived)) for index, one in enumerate(self._under_way)]
        try:
            left = len(tasks)
            while left:
                piece = await arrived.get()
                if piece is None:
                    left -= 1
                elif isinstance(piece, Exception):
                    raise piece
                else:
                    yield piece
        finally:
            for task in tasks:
                task.cancel()

    def token_ids(self) -> list[tuple[int, ...]]:
        """The tokens of each answer, once all of them are complete. Raises ChannelClosed where one is not."""
        return [one.token_ids() for one in self._under_way]

    def close(self) -> None:
        """Abort what has not ended. Closing twice is allowed."""
        for one in self._under_way:
            one.end("abort")

    async def __aenter__(self) -> Answers:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _UnderWay:
    """One answer, and its times."""

    def __init__(self, answer: AsyncAnswer, meters: Meters, endpoint: str) -> None:
        self._answer = answer
        self._meters = meters
        self._start = self._last = time.perf_counter()
        self._tokens = 0
        self._ended = False
        self._token_ids: tuple[int, ...] | None = None
        meters.began(endpoint)

    async def read(self, index: int, arrived: asyncio.Queue[tuple[int, Delta] | Exception | None]) -> None:
        """Hand on the pieces until the end, or the exception that ends them."""
        try:
            async for delta in self._answer:
                self._count()
                if delta.completion is not None:
                    self._token_ids = delta.completion.token_ids
                    self._tokens = len(self._token_ids)
                    self.end("stop" if delta.completion.finish_reason == "stop" else "length")
                arrived.put_nowait((index, delta))
            if not self._ended:
                raise ChannelClosed("the answer was ended by another")
            arrived.put_nowait(None)
        except Exception as error:
            self.end("error")
            arrived.put_nowait(error)

    def token_ids(self) -> tuple[int, ...]:
        """Of a complete answer."""
        if self._token_ids is None:
            raise ChannelClosed("the answer is not complete")
        return self._token_ids

    def end(self, reason: Reason) -> None:
        """Once: the answer holds nothing any more."""
        if not self._ended:
            self._ended = True
            if reason not in ("stop", "length"):
                self._answer.abort()
            seconds = time.perf_counter() - self._start
            self._meters.ended(reason, len(self._answer.prompt_token_ids), self._tokens, seconds)

    def _count(self) -> None:
        now = time.perf_counter()
        if not self._tokens:
            self._meters.first_token(now - self._start)
        else:
            self._meters.token(now - self._last)
        self._tokens += 1
        self._last = now


async def unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` returns. Where the client leaves first, the work is cancelled and ClientDisconnect raised."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await working


async def _left(request: Request) -> None:
    """Returns when the client has gone; the body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
