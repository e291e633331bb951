"""Alive is the process; ready is a round trip to the worker that no number of probes can make many."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette

from tests.commands import LIMIT_S
from tests.server.asgi import ask
from tests.server.worker_states import worker_state
from tsqp.api.worker_state import WorkerState
from tsqp.errors import PadsExhausted, ProductMismatch, TsqpError, WorkerLost
from tsqp.server.health import OPEN_PATHS, Problem, WorkerProbe, health_routes
from tsqp.server.lifecycle import Lifecycle


@dataclass
class FakeFiller:
    rows: int = 8
    failure: TsqpError | None = None

    def ready(self, *, answer: bool) -> int:
        assert answer
        return self.rows


@dataclass
class FakeModel:
    """A model whose worker answers when ``answers`` is set, with ``error`` if there is one."""

    silence_s: float = 100.0
    error: Exception | None = None
    worker_state: WorkerState | None = None
    filler: FakeFiller | None = None
    pads_empty: str = "wait"
    pings: int = 0
    answers: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def llm(self) -> Any:
        guard = None if self.filler is None else SimpleNamespace(filler=self.filler)
        run = SimpleNamespace(guard=SimpleNamespace(pads_empty=self.pads_empty))
        return SimpleNamespace(
            silent_s=lambda: self.silence_s,
            guard=guard,
            plan=SimpleNamespace(run=run),
        )

    async def ping(self) -> None:
        self.pings += 1
        await self.answers.wait()
        if self.error is not None:
            raise self.error
        self.silence_s = 0.0


def problem_of(change: Callable[[FakeModel], None] = lambda model: None, *, answers: bool = True) -> Problem | None:
    async def run() -> Problem | None:
        model: Any = FakeModel()
        change(model)
        if answers:
            model.answers.set()
        return await WorkerProbe(model, 0.01).problem()

    return asyncio.run(asyncio.wait_for(run(), LIMIT_S))


def having(**attributes: Any) -> Callable[[FakeModel], None]:
    def change(model: FakeModel) -> None:
        vars(model).update(attributes)

    return change


def code_of(problem: Problem | None) -> str | None:
    return None if problem is None else problem.code


def test_a_worker_that_answers_is_ready() -> None:
    assert problem_of() is None


def test_a_worker_that_is_silent_is_not() -> None:
    assert code_of(problem_of(answers=False)) == "worker_silent"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (WorkerLost("canary"), "worker_lost"),
        (ProductMismatch("canary"), "check_failed"),
        (PadsExhausted("canary"), "no_pads"),
        (ValueError("canary"), "failed"),
    ],
)
def test_a_round_trip_that_fails_says_why_and_no_more(error: Exception, code: str) -> None:
    problem = problem_of(having(error=error))
    assert problem is not None
    assert problem.code == code
    assert "canary" not in problem.text


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (worker_state("reconnecting", expelled={"canary": "canary"}), "worker_lost"),
        (worker_state("failed", cheated=True, expelled={"canary": "canary"}), "check_failed"),
        (worker_state("failed", cheated=True, failed_checks=1), "check_failed"),
        (worker_state("failed", failed_checks=1, expelled={"canary": "canary"}), "worker_lost"),  # by another, before
        (worker_state("failed"), "worker_lost"),
    ],
)
def test_without_a_worker_nobody_is_asked(state: WorkerState, code: str) -> None:
    async def run() -> None:
        model: Any = FakeModel(silence_s=0.0, worker_state=state)
        problem = await WorkerProbe(model, 0.01).problem()
        assert problem is not None
        assert problem.code == code
        assert "canary" not in problem.text
        assert model.pings == 0

    asyncio.run(run())


def test_a_sign_of_life_within_a_second_is_enough() -> None:
    async def run() -> None:
        model: Any = FakeModel(silence_s=0.9)
        assert await WorkerProbe(model, 0.01).problem() is None
        assert model.pings == 0

    asyncio.run(run())


def test_many_probes_are_one_round_trip() -> None:
    async def run() -> None:
        model: Any = FakeModel()
        probe = WorkerProbe(model, 30.0)
        asked = [asyncio.create_task(probe.problem()) for _ in range(100)]
        while not model.pings:
            await asyncio.sleep(0)
        model.answers.set()
        assert set(await asyncio.gather(*asked)) == {None}
        assert await probe.problem() is None
        assert model.pings == 1

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))


def test_a_round_trip_that_fails_is_told_to_all_who_wait_for_it() -> None:
    async def run() -> None:
        model: Any = FakeModel(error=WorkerLost("x"))
        probe = WorkerProbe(model, 30.0)
        asked = [asyncio.create_task(probe.problem()) for _ in range(10)]
        while not model.pings:
            await asyncio.sleep(0)
        model.answers.set()
        assert {code_of(problem) for problem in await asyncio.gather(*asked)} == {"worker_lost"}

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))


def test_a_round_trip_that_succeeds_proves_nothing_once_the_worker_is_lost() -> None:
    """A step may take the place of a round trip, and a step survives the loss of its worker."""

    class Losing(FakeModel):
        async def ping(self) -> None:
            self.worker_state = worker_state("reconnecting")

    async def run() -> None:
        model: Any = Losing()
        assert code_of(await WorkerProbe(model, 30.0).problem()) == "worker_lost"

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))


def test_a_silent_worker_is_asked_once_and_heard_when_it_wakes() -> None:
    async def run() -> None:
        model: Any = FakeModel()
        probe = WorkerProbe(model, 0.01)
        for _ in range(3):
            assert code_of(await probe.problem()) == "worker_silent"
        assert model.pings == 1
        model.answers.set()
        while code_of(await probe.problem()) is not None:
            pass
        assert model.pings == 1

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))


def test_a_pass_under_way_is_not_waited_for() -> None:
    """Its replies are signs of life, although the round trip has to wait for its end."""

    async def run() -> None:
        model: Any = FakeModel()
        probe = WorkerProbe(model, 30.0)
        asked = asyncio.create_task(probe.problem())
        while not model.pings:
            await asyncio.sleep(0)
        model.silence_s = 0.1
        assert await asked is None
        assert not model.answers.is_set()

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))


@pytest.mark.parametrize(
    ("filler", "pads_empty", "code"),
    [
        (FakeFiller(0), "wait", None),  # they are made on the spot
        (FakeFiller(0), "refuse", "no_pads"),
        (FakeFiller(1), "refuse", None),
        (FakeFiller(9, PadsExhausted("canary")), "wait", "pads_failed"),
    ],
)
def test_pads_count_where_requests_are_refused_without_them(
    filler: FakeFiller, pads_empty: str, code: str | None
) -> None:
    assert code_of(problem_of(having(filler=filler, pads_empty=pads_empty))) == code


class FixedProbe:
    def __init__(self, found: Problem | None) -> None:
        self.found = found

    async def problem(self) -> Problem | None:
        return self.found


def app_of(found: Problem | None, lifecycle: Lifecycle | None = None) -> Starlette:
    return Starlette(routes=health_routes(FixedProbe(found), lifecycle or Lifecycle()))


def test_the_three_paths() -> None:
    lost = Problem("worker_lost", "the worker is lost")
    assert set(OPEN_PATHS) == {route.path for route in health_routes(FixedProbe(None), Lifecycle())}
    for path in ("/readyz", "/health"):
        ready = ask(app_of(None), path)
        assert (ready.status_code, ready.json()) == (200, {"status": "ready"})
        answer = ask(app_of(lost), path)
        assert answer.status_code == 503
        assert answer.json() == {"status": "not ready", "code": lost.code, "reason": lost.text}
        draining = ask(app_of(None, Lifecycle(draining=True)), path)
        assert (draining.status_code, draining.json()["code"]) == (503, "shutting_down")
    assert ask(app_of(lost, Lifecycle(draining=True)), "/livez").status_code == 200
