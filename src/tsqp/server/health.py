"""Is the process alive, and can requests be answered: ``/livez``, ``/readyz`` and ``/health``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tsqp.errors import CheckFailed, PadError, TsqpError
from tsqp.server.lifecycle import Lifecycle

if TYPE_CHECKING:
    from tsqp.api.async_llm import AsyncLLM
    from tsqp.api.worker_state import WorkerState

FRESH_S = 1.0  # what the worker has said within so long is proof enough
LOOK_S = 0.05  # how often signs of life of a pass under way are looked for
OPEN_PATHS = ("/livez", "/readyz", "/health")  # no key, and also while the server drains


class Problem(NamedTuple):
    """Why requests cannot be answered: a word for programs and a sentence for people. Neither holds any secret."""

    code: str
    text: str


_CHEATED = Problem("check_failed", "a product of the worker was wrong: it is not asked for anything any more")
_LOST = Problem("worker_lost", "the worker is lost")


class Probe(Protocol):
    """What knows whether requests can be answered now."""

    async def problem(self) -> Problem | None:
        """Why not, if not; within a deadline, and without waiting for a pass that is under way."""


class WorkerProbe:
    """A real round trip to the worker, within ``deadline_s``, and pads where requests are refused without them.

    However many ask, there is one round trip at a time, and none within a second of the last sign of life: a probe
    cannot load the worker. A pass under way is not waited for, as the replies within it are signs of life.
    """

    def __init__(self, model: AsyncLLM, deadline_s: float) -> None:
        self._model = model
        self._deadline_s = deadline_s
        self._asked: asyncio.Task[None] | None = None

    async def problem(self) -> Problem | None:
        """See ``Probe``."""
        return await self._problem_of_worker() or self._problem_of_pads()

    async def _problem_of_worker(self) -> Problem | None:
        problem = _of_state(self._model.worker_state)
        if problem is not None:
            return problem
        end = time.monotonic() + self._deadline_s
        while not self._heard():
            asked = self._asked = self._asked or asyncio.create_task(self._model.ping())
            done, _ = await asyncio.wait([asked], timeout=min(LOOK_S, max(0.0, end - time.monotonic())))
            if done:
                if self._asked is asked:
                    self._asked = None  # whoever asks next makes another one
                return _of_round_trip(asked) or _of_state(self._model.worker_state)
            if time.monotonic() >= end:
                return Problem("worker_silent", f"the worker has not answered for {self._deadline_s:g} s")
        return None

    def _heard(self) -> bool:
        return self._model.llm.silent_s() <= FRESH_S

    def _problem_of_pads(self) -> Problem | None:
        guard = self._model.llm.guard
        if guard is None or guard.filler is None:
            return None
        if guard.filler.failure is not None:
            return Problem("pads_failed", "no more pads can be made")
        if self._model.llm.plan.run.guard.pads_empty == "refuse" and not guard.filler.ready(answer=True):
            return Problem("no_pads", "no pads are ready: requests are refused until there are some")
        return None


def _of_round_trip(asked: asyncio.Task[None]) -> Problem | None:
    """What came of one that is over."""
    error = asyncio.CancelledError() if asked.cancelled() else asked.exception()
    return None if error is None else _explained(error)


def _of_state(state: WorkerState | None) -> Problem | None:
    """What is known without a round trip."""
    if state is None or state.state == "ready":
        return None
    if state.state == "reconnecting":
        return Problem("worker_lost", "the worker is lost, and another one is waited for")
    return _CHEATED if state.cheated else _LOST


def _explained(error: BaseException) -> Problem:
    if isinstance(error, CheckFailed):
        return _CHEATED
    if isinstance(error, PadError):
        return Problem("no_pads", "no pads are ready")
    if isinstance(error, TsqpError):
        return _LOST
    return Problem("failed", "the round trip to the worker failed")


def health_routes(probe: Probe, lifecycle: Lifecycle) -> Sequence[Route]:
    """The three endpoints. They tell no numbers: how fast pads go would tell how much others generate."""

    async def live(_: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(_: Request) -> Response:
        problem = (
            Problem("shutting_down", "the server is shutting down") if lifecycle.draining else await probe.problem()
        )
        if problem is None:
            return JSONResponse({"status": "ready"})
        body = {"status": "not ready", "code": problem.code, "reason": problem.text}
        return JSONResponse(body, 503, {"retry-after": "1"})

    return [Route("/livez", live), Route("/readyz", ready), Route("/health", ready)]
