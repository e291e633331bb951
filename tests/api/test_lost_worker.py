"""A worker that is lost costs a pause and not a token, whatever the mode and the moment, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.api.mortal import MODEL, PARAMS, PROMPTS, Mortal, MortalRecorder, answers, living, plain_worker
from tests.commands import LIMIT_S, Home, children, wait_gone
from tests.trusted.guard.fakes import MODES, record_blocks, secrets_of
from tests.trusted.guard.scan import shared_pads
from tests.trusted.step_runs import CALLS
from tsqp import LLM, AsyncLLM, Completion, ComputeConfig, Limits, SamplingParams, WorkerConfig
from tsqp.api.config import GuardConfig, PartitionName, ProtectionName
from tsqp.errors import ChannelClosed, InputError, QueueFull, WorkerLost, WorkerUnreachable
from tsqp.wire.transport import connect

OPEN = ComputeConfig(dtype="float32", threads=1)


def worker(*addresses: str, **options: Any) -> WorkerConfig:
    return WorkerConfig(addresses, deadline_s=LIMIT_S, patience_s=options.pop("patience_s", LIMIT_S), **options)


@pytest.fixture(scope="module")
def undisturbed() -> list[Completion]:
    """What the private modes answer; they agree to the bit."""
    with living(MortalRecorder()) as address, LLM(MODEL, protection="verified", worker=address) as llm:
        return answers(llm)


def private(mode: ProtectionName, *addresses: str, compiled: bool = True, **options: Any) -> LLM:
    pads = options if mode == "masked" else {}
    guard = GuardConfig(compiled_step=compiled, **pads)
    return LLM(MODEL, protection=mode, worker=worker(*addresses), guard=guard)


def deaths(seed: int, count: int = 4, calls: int = 150) -> list[int]:
    return random.Random(seed).sample(range(2, calls), count)  # after the first handshake


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled step", "plain step"])
@pytest.mark.parametrize("mode", MODES)
def test_every_stream_goes_on_as_if_nothing_had_happened(
    mode: ProtectionName,
    compiled: bool,
    seed: int,
    undisturbed: list[Completion],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = record_blocks(monkeypatch)
    mortal = MortalRecorder(deaths(seed))
    with living(mortal) as address, private(mode, address, compiled=compiled) as llm:
        assert answers(llm) == undisturbed
        assert not mortal.deaths
        state = llm.worker_state
        assert state is not None
        assert (state.state, state.losses, state.reconnects, state.failed_checks) == ("ready", 4, 4, 0)
        counts = llm.engine.counts()
        assert (counts.ended["length"], counts.preemptions) == (len(PROMPTS), 0)
    assert bool(blocks) == (mode == "masked")
    assert not secrets_of(blocks)
    if mode == "masked":
        assert not shared_pads(mortal.rows(np.uint32))


@pytest.mark.parametrize("mode", MODES)
def test_what_a_lost_session_held_is_free_at_once(mode: ProtectionName) -> None:
    """Not when the next garbage is collected: it is an arena and, where pads are made here, a copy of the weights."""
    mortal = MortalRecorder([40])
    with living(mortal) as address, private(mode, address) as llm:
        session, guard = weakref.ref(llm.session), weakref.ref(llm.guard)
        gc.collect()
        gc.disable()
        try:
            answers(llm)
        finally:
            gc.enable()
        assert not mortal.deaths
        assert session() is None
        assert guard() is None


def test_what_a_lost_session_held_is_given_back_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pads before the next ones are made, and the rest once nothing of it is left."""
    sessions: list[weakref.ref[Any]] = []
    gone: list[bool] = []
    monkeypatch.setattr("tsqp.api.supervisor.give_back_freed_memory", lambda: gone.append(sessions[0]() is None))
    mortal = MortalRecorder([40])
    with living(mortal) as address, private("masked", address) as llm:
        sessions.append(weakref.ref(llm.session))
        gc.collect()
        gc.disable()
        try:
            answers(llm)
        finally:
            gc.enable()
    assert not mortal.deaths
    assert gone == [False, True]


@pytest.mark.parametrize("mode", MODES)
def test_standbys_take_over_in_turn(mode: ProtectionName, undisturbed: list[Completion]) -> None:
    first, second, third = (MortalRecorder([number]) for number in (40, 31, 52))
    with (
        living(first) as one,
        living(second) as two,
        living(third) as three,
        private(mode, one, two, three) as llm,
    ):
        assert answers(llm) == undisturbed
        state = llm.worker_state
        assert state is not None
        assert (state.address, state.losses) == (one, 3)


@pytest.mark.parametrize("partition", ["linear", "op", "layer"])
def test_at_open_too(partition: PartitionName) -> None:
    """At ``layer`` the caches are lost with the worker, and sequences are computed again."""
    compute = ComputeConfig(partition, dtype="float32", threads=1)

    def run(mortal: Mortal) -> list[Completion]:
        with (
            living(mortal) as address,
            LLM(MODEL, protection="open", worker=worker(address), compute=compute) as llm,
        ):
            found = answers(llm)
            counts = llm.engine.counts()
            assert (counts.preemptions > 0) == (partition == "layer" and bool(llm.worker_state.losses))  # type: ignore[union-attr]
            return found

    expected = run(plain_worker())
    mortal = plain_worker([11, 30, 61])
    found = run(mortal)
    assert not mortal.deaths
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert [one.finish_reason for one in found] == [one.finish_reason for one in expected]


def test_single_passes_are_asked_for_again_too(undisturbed: list[Completion]) -> None:
    mortal = MortalRecorder([6])
    with living(mortal) as address, private("masked", address) as llm:
        logits = llm.logits(PROMPTS[1])
        assert logits[-1].argmax() == llm.generate([PROMPTS[1]], SamplingParams(max_tokens=1))[0].token_ids[0]
        assert llm.worker_state.losses == 1  # type: ignore[union-attr]


def test_promised_pads_are_made_again_before_an_answer_goes_on(
    undisturbed: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that refuses to make missing pads keeps its word to those it has taken on, and to nobody else."""
    blocks = record_blocks(monkeypatch)
    mortal = MortalRecorder([40, 120])
    pads: dict[str, Any] = {"pads_empty": "refuse", "pads_ahead": 160, "warm_pads": True}
    with living(mortal) as address, private("masked", address, **pads) as llm:
        assert answers(llm) == undisturbed
        assert llm.worker_state.reconnects == 2  # type: ignore[union-attr]
        assert llm.guard is not None
        assert llm.guard.report()["pads_missed"] == 0
        with pytest.raises(InputError, match="kept for 160 tokens"):
            llm.generate([1], SamplingParams(max_tokens=1000))
    assert not secrets_of(blocks)
    assert not shared_pads(mortal.rows(np.uint32))


@pytest.mark.parametrize("ahead", [0, 64])
def test_a_lost_dealer_is_waited_for(ahead: int, undisturbed: list[Completion]) -> None:
    mortal, dealer = MortalRecorder(), MortalRecorder([5, 14])
    with living(mortal) as address, living(dealer) as dealt:
        pads: dict[str, Any] = {"pad_source": f"dealer={dealt}", "dealer_no_separation": True, "pads_ahead": ahead}
        with private("masked", address, **pads) as llm:
            assert answers(llm) == undisturbed
            assert llm.worker_state.losses >= 2  # type: ignore[union-attr]
            assert llm.worker_state.expelled == {}  # type: ignore[union-attr]
    assert not dealer.deaths
    assert not shared_pads(mortal.rows(np.uint32))


def test_figures_of_the_guard_are_those_of_all_sessions() -> None:
    """All that were answered, but for those of a step that was lost, which count for nothing."""
    used = []
    for deaths in ([], [45, 90]):
        mortal = MortalRecorder(deaths)
        with living(mortal) as address, private("masked", address, pads_ahead=0) as llm:
            answers(llm)
            assert llm.guard is not None
            report = llm.guard.report()
        lost = mortal.products - report["products_checked"]  # type: ignore[operator]
        assert len(deaths) <= lost <= len(deaths) * CALLS
        used.append(report["pads_used"])
    whole, parts = used
    assert parts > whole  # type: ignore[operator]


def test_after_patience_all_requests_end_and_the_next_one_begins_anew(undisturbed: list[Completion]) -> None:
    mortal = MortalRecorder([30])
    refuses = threading.Event()

    def dial(address: str, **options: Any) -> Any:
        if refuses.is_set():
            raise WorkerUnreachable("nobody answered", address=address)
        return connect(address, **options)

    async def run(llm: AsyncLLM) -> None:
        refuses.set()
        asked = (llm.generate(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True))
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(result, WorkerLost) and "no worker within" in str(result) for result in results)
        assert llm.worker_state is not None
        assert llm.worker_state.state == "failed"
        counts = llm.counts()
        assert (counts.ended["error"], counts.running, counts.waiting, counts.kv_bytes) == (len(PROMPTS), 0, 0, 0)
        refuses.clear()
        assert llm.llm._workers is not None
        llm.llm._workers._patience_s = LIMIT_S  # for a worker that is there, and may be slow
        assert await llm.generate(PROMPTS[0], PARAMS[0]) == undisturbed[0]

    with living(mortal) as address:
        config = worker(address, patience_s=0.3)
        as_async(LLM(MODEL, protection="masked", worker=config, connect=dial), run)


def as_async(llm: LLM, test: Any) -> None:
    async def run() -> None:
        async with AsyncLLM(llm) as served:
            await test(served)

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))


@contextmanager
def nobody_there(limits: Limits | None = None) -> Iterator[tuple[LLM, threading.Event]]:
    """A model whose worker dies of its first pass, and cannot be reached until the event is set."""
    back = threading.Event()

    def dial(address: str, **options: Any) -> Any:
        if dialled and not back.is_set():
            raise WorkerUnreachable("nobody answered", address=address)
        dialled.append(address)
        return connect(address, **options)

    dialled: list[str] = []
    with living(MortalRecorder([5])) as address:
        yield LLM(MODEL, protection="masked", worker=worker(address), connect=dial, limits=limits), back


async def paused(llm: AsyncLLM) -> None:
    while llm.worker_state is None or llm.worker_state.state != "reconnecting":
        await asyncio.sleep(0.001)


def test_while_it_waits_requests_come_and_go(undisturbed: list[Completion]) -> None:
    async def run(llm: AsyncLLM) -> None:
        stays = await llm.open(PROMPTS[0], PARAMS[0])
        goes = await llm.open(PROMPTS[1], PARAMS[1])
        await paused(llm)
        goes.abort()
        while llm.counts().ended["abort"] != 1:
            await asyncio.sleep(0.001)
        comes = await llm.open(PROMPTS[2], PARAMS[2])
        waits = await llm.open(PROMPTS[3], PARAMS[3])
        with pytest.raises(QueueFull):
            await llm.open(PROMPTS[3], PARAMS[3])
        back.set()
        for answer, expected in ((stays, undisturbed[0]), (comes, undisturbed[2]), (waits, undisturbed[3])):
            (completion,) = [delta.completion async for delta in answer if delta.completion is not None]
            assert completion == expected

    with nobody_there(Limits(running=1, waiting=2)) as (llm, back):
        as_async(llm, run)


def test_closing_does_not_wait_for_a_worker() -> None:
    async def run() -> None:
        served = AsyncLLM(llm)
        answer = await served.open(PROMPTS[0], PARAMS[0])
        await paused(served)
        await served.close(0.0)
        with pytest.raises(ChannelClosed):
            [delta async for delta in answer]

    with nobody_there() as (llm, _):
        asyncio.run(asyncio.wait_for(run(), LIMIT_S))


# Processes


@pytest.fixture
def nothing_is_left(home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """No descriptor, process, segment or socket more than before; the children that were there.

    What other tests have left may go meanwhile.
    """
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home.runtime))
    before, segments, others = descriptors(), arenas(), children(os.getpid())
    yield others
    after = descriptors()
    assert after.total() <= before.total(), after - before
    assert set(children(os.getpid())) <= set(others)
    assert arenas() <= segments
    assert home.leftovers() == []


def descriptors() -> Counter[str]:
    """What this process's descriptors are of."""
    gc.collect()
    found: Counter[str] = Counter()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one of the directory itself
            found[str(link.readlink())] += 1
    return found


def arenas() -> int:
    """How many segments of arenas are in this process's memory."""
    return Path("/proc/self/maps").read_text().count("tsqp-arena")


def killed_at(llm: LLM, numbers: list[int], monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGKILL) -> list[int]:
    """Kills a worker at a random moment after each of these steps of the engine; the processes, each killed once."""
    killed: list[int] = []
    due, steps, real = sorted(numbers), iter(range(10**9)), llm.engine._step

    def kill(pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def step() -> Any:
        pid = llm.worker_pid
        if next(steps) >= (due or [10**9])[0] and pid is not None and pid not in killed:
            due.pop(0)
            killed.append(pid)
            threading.Timer(random.Random(len(killed)).random() * 0.003, kill, (pid,)).start()
        return real()

    monkeypatch.setattr(llm.engine, "_step", step)
    return killed


@pytest.mark.slow
def test_kill_9_of_the_worker_that_was_started_here(
    nothing_is_left: list[int], undisturbed: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(MODEL, protection="masked", compute=ComputeConfig(threads=1)) as llm:
        killed = killed_at(llm, [3, 12], monkeypatch)
        assert answers(llm) == undisturbed
        assert len(set(killed)) == 2
        assert set(children(os.getpid())) - set(nothing_is_left) == {llm.worker_pid}
    for pid in killed:
        wait_gone(pid)


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_is_left")
def test_a_worker_that_is_stopped_is_killed_after_the_deadline(
    undisturbed: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = WorkerConfig(deadline_s=2.0, patience_s=LIMIT_S)
    with LLM(MODEL, protection="masked", worker=config, compute=ComputeConfig(threads=1)) as llm:
        killed = killed_at(llm, [5], monkeypatch, signal.SIGSTOP)
        assert answers(llm) == undisturbed
        (stopped,) = killed
        wait_gone(stopped)


@pytest.mark.slow
def test_a_worker_that_ends_without_requests_is_there_again_before_the_next() -> None:
    async def run(llm: AsyncLLM) -> None:
        pid = llm.llm.worker_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        while llm.worker_state is None or llm.worker_state.reconnects != 1:
            await asyncio.sleep(0.01)
        assert llm.llm.worker_pid not in (pid, None)
        assert llm.counts().added == 0

    as_async(LLM(MODEL, protection="open", compute=OPEN), run)


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("mode", MODES)
def test_twenty_kills_under_sixteen_streams(mode: ProtectionName, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        ([*PROMPTS[n % 4], n + 3], SamplingParams(max_tokens=60, ignore_eos=True, temperature=n % 2, seed=n))
        for n in range(16)
    ]

    def run(llm: LLM) -> list[Completion]:
        async def gathered() -> list[Completion]:
            async with AsyncLLM(llm) as served:
                return list(await asyncio.gather(*(served.generate(*one) for one in asked)))

        return asyncio.run(gathered())

    expected = run(LLM(MODEL, protection=mode, compute=ComputeConfig(threads=1)))
    blocks = record_blocks(monkeypatch)
    llm = LLM(MODEL, protection=mode, worker=WorkerConfig(patience_s=LIMIT_S), compute=ComputeConfig(threads=1))
    killed = killed_at(llm, random.Random(1).sample(range(55), 20), monkeypatch)
    assert run(llm) == expected
    for pid in killed:
        wait_gone(pid)
    assert len(killed) == 20
    assert not secrets_of(blocks)
