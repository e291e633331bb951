"""The asyncio front: the answers of an LLM, as tasks that may be cancelled, and an end that loses none."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.commands import LIMIT_S, wait_until
from tests.conftest import StartWorker
from tests.families import tiny_model
from tsqp import LLM, AsyncLLM, Completion, ComputeConfig, Limits, SamplingParams, StructuredOutputsParams
from tsqp.api import async_llm
from tsqp.api.async_llm import AsyncAnswer
from tsqp.api.config import PartitionName, ProtectionName
from tsqp.config.dtype import ComputeDtype
from tsqp.errors import ChannelClosed, OptionError, PromptError, QueueFull, UnsupportedModel, WorkerLost
from tsqp.model.batch import Batch
from tsqp.model.pending import Steps

MODEL = str(tiny_model("llama").directory)
TEXTS = ["The quick brown fox", "jumps", "over the lazy dog"]
LONG = SamplingParams(max_tokens=200, ignore_eos=True)


def local(limits: Limits | None = None) -> LLM:
    return LLM(MODEL, protection="local", compute=ComputeConfig(dtype="float32"), limits=limits)


def with_llm(test: Callable[[AsyncLLM], Coroutine[Any, Any, None]], limits: Limits | None = None) -> None:
    async def run() -> None:
        async with AsyncLLM(local(limits)) as llm:
            await test(llm)

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))


async def nothing_left(llm: AsyncLLM) -> None:
    while llm.counts().running or llm.counts().waiting:
        await asyncio.sleep(0.001)


def test_answers_are_those_of_the_llm() -> None:
    params = SamplingParams(max_tokens=12)
    with local() as llm:
        expected = llm.generate(TEXTS, params)

    async def test(llm: AsyncLLM) -> None:
        async def streamed(text: str) -> Completion:
            deltas = [delta async for delta in llm.stream(text, params)]
            assert deltas[-1].completion is not None
            assert "".join(delta.text for delta in deltas) == deltas[-1].completion.text
            return deltas[-1].completion

        assert await asyncio.gather(*(llm.generate(text, params) for text in TEXTS)) == expected
        assert await asyncio.gather(*(streamed(text) for text in TEXTS)) == expected
        counts = llm.counts()
        assert (counts.added, counts.ended["length"]) == (6, 6)

    with_llm(test)


def test_every_parameter_holds_here_too() -> None:
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=3, logprobs=2)
    form = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["yes", "no"]))
    with local() as llm:
        (expected,) = llm.generate(TEXTS[:1], params)
        with pytest.raises(
            UnsupportedModel, match="structured outputs"
        ) as refused:  # no form can end without an end token
            llm.generate(TEXTS[:1], form)
    assert expected.logprobs

    async def test(llm: AsyncLLM) -> None:
        assert await llm.generate(TEXTS[0], params) == expected
        with pytest.raises(UnsupportedModel) as also:
            await llm.generate(TEXTS[0], form)
        assert str(also.value) == str(refused.value)
        with pytest.raises(OptionError, match="stop_token_ids"):
            await llm.generate(TEXTS[0], SamplingParams(stop_token_ids=(10**6,)))
        assert llm.counts().added == 1

    with_llm(test)


def test_a_stop_string_ends_the_request_as_complete() -> None:
    with local() as sync:
        (whole,) = sync.generate(TEXTS[0], SamplingParams(max_tokens=12))

    async def test(llm: AsyncLLM) -> None:
        completion = await llm.generate(TEXTS[0], SamplingParams(max_tokens=12, stop=(whole.text[3],)))
        assert completion.finish_reason == "stop"
        assert completion.text == whole.text[: whole.text.index(whole.text[3])]
        await nothing_left(llm)
        assert llm.counts().ended["stop"] == 1

    with_llm(test)


def test_who_reads_an_answer_may_say_that_it_has_ended() -> None:
    """It counts as complete then, also at the bound of tokens, and nothing more is computed."""
    with local() as sync:
        (whole,) = sync.generate(TEXTS[0], SamplingParams(max_tokens=12))

    async def test(llm: AsyncLLM) -> None:
        for most in (4, 12):
            pieces: list[str] = []

            def ends(piece: str, pieces: list[str] = pieces) -> bool:
                pieces.append(piece)
                return len(pieces) == 4

            async with await llm.open(TEXTS[0], SamplingParams(max_tokens=most), ends=ends) as answer:
                deltas = [delta async for delta in answer]
            completion = deltas[-1].completion
            assert completion is not None
            assert completion.finish_reason == "stop"
            assert completion.token_ids == whole.token_ids[:4]
            assert "".join(pieces) == completion.text[: len("".join(pieces))]
            assert "".join(delta.text for delta in deltas) == completion.text
        await nothing_left(llm)

    with_llm(test)


def test_a_cancelled_task_ends_its_request_and_no_other() -> None:
    async def test(llm: AsyncLLM) -> None:
        begun = asyncio.Event()

        async def endless() -> None:
            async for _ in llm.stream(TEXTS[0], LONG):
                begun.set()

        task = asyncio.create_task(endless())
        await begun.wait()
        other = asyncio.create_task(llm.generate(TEXTS[1], SamplingParams(max_tokens=20, ignore_eos=True)))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len((await other).token_ids) == 20
        await nothing_left(llm)
        counts = llm.counts()
        assert (counts.ended["abort"], counts.ended["length"], counts.kv_bytes) == (1, 1, 0)

    with_llm(test)


def test_an_answer_may_be_aborted_while_somebody_waits_for_it() -> None:
    async def test(llm: AsyncLLM) -> None:
        answer = await llm.open(TEXTS[0], LONG)

        async def all_of_it() -> int:
            return len([delta async for delta in answer])

        task = asyncio.create_task(all_of_it())
        await asyncio.sleep(0)
        answer.abort()
        answer.abort()
        assert await task < 200
        await nothing_left(llm)

    with_llm(test)


def test_what_is_wrong_is_raised_before_anything_begins() -> None:
    async def test(llm: AsyncLLM) -> None:
        with pytest.raises(PromptError):
            await llm.open("  ")
        with pytest.raises(PromptError):
            await llm.open([100_000])
        with pytest.raises(OptionError, match="leave out tools"):
            await llm.open([1, 2], tools=[])
        running = await llm.open(TEXTS[0], LONG)
        await anext(running)
        waiting = await llm.open(TEXTS[1], LONG)
        with pytest.raises(QueueFull):
            await llm.open(TEXTS[2], LONG)
        for answer in (running, waiting):
            answer.abort()
        await nothing_left(llm)
        assert llm.counts().added == 2

    with_llm(test, Limits(running=1, waiting=1))


def test_closing_waits_for_what_is_under_way() -> None:
    async def test() -> None:
        llm = AsyncLLM(local())
        answer = await llm.open(TEXTS[0], SamplingParams(max_tokens=30, ignore_eos=True))
        await llm.close()
        deltas = [delta async for delta in answer]
        assert deltas[-1].completion is not None
        assert len(deltas[-1].completion.token_ids) == 30
        with pytest.raises(ChannelClosed):
            await llm.open(TEXTS[0])
        await llm.close()
        assert not llm._thread.is_alive()

    asyncio.run(asyncio.wait_for(test(), LIMIT_S))


def test_closing_at_once_says_so_to_those_who_wait() -> None:
    async def test() -> None:
        llm = AsyncLLM(local())
        answer = await llm.open(TEXTS[0], LONG)
        await llm.close(drain_s=0)
        with pytest.raises(ChannelClosed):
            async for _ in answer:
                pass

    asyncio.run(asyncio.wait_for(test(), LIMIT_S))


def test_closing_in_one_loop_is_told_to_who_waits_in_another(monkeypatch: pytest.MonkeyPatch) -> None:
    async def opened(llm: AsyncLLM) -> AsyncAnswer:
        decoder: Any = llm.llm.engine.decoder
        forward = decoder.forward

        def until_closing(batch: Batch[Any]) -> Steps[torch.Tensor]:
            wait_until(llm._over.is_set)
            return forward(batch)

        answer = await llm.open(TEXTS[0], LONG)
        await anext(aiter(answer))
        monkeypatch.setattr(decoder, "forward", until_closing)
        return answer

    async def rest(answer: AsyncAnswer) -> None:
        async for _ in answer:
            pass

    async def close(llm: AsyncLLM) -> None:
        await asyncio.wait_for(llm.close(0.0), LIMIT_S)

    llm = AsyncLLM(local())
    with asyncio.Runner() as one:
        answer = one.run(opened(llm))
        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, close(llm)).result(LIMIT_S)
        with pytest.raises(ChannelClosed):
            one.run(asyncio.wait_for(rest(answer), LIMIT_S))


def test_a_failed_pass_is_told_to_all_and_the_next_request_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(llm: AsyncLLM) -> None:
        decoder: Any = llm.llm.engine.decoder
        forward = decoder.forward
        failed: list[bool] = []

        def failing(batch: Batch[Any]) -> Steps[torch.Tensor]:
            if len(batch.tokens) == 2 and not failed:
                failed.append(True)
                raise WorkerLost("went away")
            return forward(batch)

        monkeypatch.setattr(decoder, "forward", failing)
        tasks = [asyncio.create_task(llm.generate(text, LONG)) for text in TEXTS[:2]]
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, WorkerLost)
        assert (await llm.generate(TEXTS[0], SamplingParams(max_tokens=3, ignore_eos=True))).finish_reason == "length"
        assert llm.counts().ended["error"] == 2

    with_llm(test)


@pytest.mark.parametrize("error", [WorkerLost("secret"), ValueError("secret"), RecursionError("secret")])
def test_whatever_fails_in_idle_time_requests_are_served_afterwards(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody but this thread steps: if it ended, every later request would wait for ever."""
    monkeypatch.setattr(async_llm, "LOOK_S", 0.001)

    async def test(llm: AsyncLLM) -> None:
        mended: list[None] = []

        def failing() -> None:
            mended.append(None)
            raise error

        monkeypatch.setattr(llm.llm.engine, "mend", failing)
        while len(mended) < 3:
            await asyncio.sleep(0.001)
        assert (await llm.generate(TEXTS[0], SamplingParams(max_tokens=3, ignore_eos=True))).finish_reason == "length"

    with caplog.at_level(logging.DEBUG, "tsqp.workers"):
        with_llm(test)
    expected = [] if isinstance(error, WorkerLost) else [f"while a worker was waited for: {type(error).__name__}"]
    assert [record.getMessage() for record in caplog.records if record.name == "tsqp.workers"] == expected
    assert not any(record.exc_info for record in caplog.records)


def test_a_loop_that_is_gone_leaves_no_request_behind() -> None:
    llm = AsyncLLM(local())

    async def leave() -> None:
        await llm.open(TEXTS[0], LONG)

    asyncio.run(leave())
    while llm.counts().running or llm.counts().waiting:
        llm._thread.join(0.001)
    asyncio.run(llm.close())


@pytest.mark.parametrize(
    ("protection", "partition", "dtype"),
    [
        ("open", "linear", "float32"),
        ("open", "layer", "float32"),
        ("open", "linear", "int8"),
        ("open", "layer", "int8"),
        ("verified", "linear", "field"),
        ("masked", "linear", "field"),
    ],
)
def test_a_ping_is_a_round_trip_that_changes_nothing(
    start_worker: StartWorker, protection: ProtectionName, partition: PartitionName, dtype: ComputeDtype
) -> None:
    address = start_worker(MODEL, "ipc", dtype)
    compute = ComputeConfig(partition=partition, dtype="auto" if dtype == "field" else dtype)

    async def run() -> None:
        llm = LLM(MODEL, protection=protection, worker=address, compute=compute)
        expected = llm.generate(TEXTS, SamplingParams(max_tokens=9))
        async with AsyncLLM(llm) as model:
            before = llm.stats.rpc_calls, guard_figures(llm)
            await model.ping()
            await model.ping()
            assert llm.silent_s() < 60
            assert (llm.stats.rpc_calls, guard_figures(llm)) == (before[0] + 2, before[1])  # no pad, no check
            answers = [asyncio.create_task(model.generate(text, SamplingParams(max_tokens=9))) for text in TEXTS]
            while not all(answer.done() for answer in answers):
                await model.ping()
            assert [answer.result() for answer in answers] == expected
            assert llm.worker_state is not None
            assert (llm.worker_state.state, llm.worker_state.losses) == ("ready", 0)

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))


def guard_figures(llm: LLM) -> tuple[object, ...]:
    figures = {} if llm.guard is None else llm.guard.report()
    return figures.get("products_checked"), figures.get("pads_used")


def test_a_ping_of_a_worker_that_has_gone_ends_the_line(start_worker: StartWorker) -> None:
    async def run() -> None:
        llm = LLM(MODEL, protection="open", worker=start_worker(MODEL), compute=ComputeConfig(dtype="float32"))
        async with AsyncLLM(llm) as model:
            assert llm.session is not None
            silent_before = llm.silent_s()
            llm.session.fail(WorkerLost("went away"))
            with pytest.raises(WorkerLost, match="went away"):
                await model.ping()
            assert llm.worker_state is not None
            assert llm.worker_state.state != "ready"
            assert llm.silent_s() > silent_before

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))


def test_without_a_worker_there_is_nothing_to_ping() -> None:
    async def test(llm: AsyncLLM) -> None:
        await llm.ping()
        assert (llm.llm.silent_s(), llm.worker_state) == (0.0, None)
        await llm.close()
        with pytest.raises(ChannelClosed):
            await llm.ping()

    with_llm(test)


def test_a_ping_under_way_hears_that_the_model_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, may_go = threading.Event(), threading.Event()

    def held(_: LLM) -> None:
        asked.set()
        may_go.wait(LIMIT_S)

    monkeypatch.setattr(LLM, "ping", held)

    async def test(llm: AsyncLLM) -> None:
        first = asyncio.create_task(llm.ping())
        await asyncio.to_thread(asked.wait, LIMIT_S)
        second = asyncio.create_task(llm.ping())
        await asyncio.sleep(0)
        closing = asyncio.create_task(llm.close())
        while not llm._over.is_set():
            await asyncio.sleep(0)
        may_go.set()
        await first
        with pytest.raises(ChannelClosed):
            await second
        await closing

    with_llm(test)
