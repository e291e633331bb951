"""Events of a stream with those between them that say how the worker is, when that changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from tsqp.server.streams import Event

if TYPE_CHECKING:
    from tsqp.api.worker_state import WorkerState

LOOK_S = 0.1  # how often


class State(msgspec.Struct, frozen=True):
    """``state``: ready, reconnecting or failed, since so many seconds. ``expelled``: who was, since the first look."""

    state: str
    since_s: float
    expelled: list[str]


async def with_states(
    events: AsyncGenerator[Event, None], state: Callable[[], WorkerState | None]
) -> AsyncGenerator[Event, None]:
    """All of ``events``; before the next one, and while none comes, changes of the state. It is ready at first."""
    first = state()
    before = () if first is None else tuple(first.expelled)
    told: tuple[str, list[str]] = ("ready", [])
    coming = asyncio.ensure_future(_next(events))
    try:
        while True:
            await asyncio.wait((coming,), timeout=LOOK_S)
            now = state()
            if now is not None and (news := (now.state, sorted(now.expelled.keys() - before))) != told:
                told = news
                yield Event(State(now.state, round(now.since_s, 3), told[1]), "state")
            if coming.done():
                event = coming.result()
                if event is None:
                    return
                yield event
                coming = asyncio.ensure_future(_next(events))
    finally:
        coming.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await coming
        await events.aclose()


async def _next(events: AsyncGenerator[Event, None]) -> Event | None:
    """None after the last one."""
    return await anext(events, None)
