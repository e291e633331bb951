"""Metrics are true at every moment, also after aborts, and name nobody."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from benchmarks.soak import Traffic, unbalanced
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette

from tests.commands import LIMIT_S, wait_until
from tests.families import tiny_model
from tests.held import held
from tests.server.asgi import ask
from tests.server.chat_model import chat_model
from tests.server.serving import NAME, served, service_of
from tests.server.worker_states import worker_state
from tsqp import LLM, AsyncLLM, ComputeConfig, Limits, SamplingParams
from tsqp.errors import QueueFull
from tsqp.server.metrics import PrometheusMeters, metrics_route

MODEL = str(tiny_model("llama").directory)
OF_VLLM = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
)

ENDED = "vllm:request_success_total"

Samples = dict[tuple[str, ...], float]


def samples(page: bytes) -> Samples:
    """Values by name and labels but the model's."""
    found: Samples = {}
    for family in text_string_to_metric_families(page.decode()):
        for one in family.samples:
            assert one.labels.pop("model_name") == "tiny"
            found[(one.name, *one.labels.values())] = one.value
    return found


def local() -> LLM:
    return LLM(MODEL, protection="local", compute=ComputeConfig(dtype="float32"), limits=Limits(running=4, waiting=6))


def test_all_names_are_there_from_the_start() -> None:
    async def run() -> None:
        async with AsyncLLM(local()) as model:
            found = samples(PrometheusMeters(model, "tiny").page())
            assert {name for name, *_ in found} >= set(OF_VLLM)
            ended = {key[1] for key in found if key[0] == "vllm:request_success_total"}
            assert ended == {"stop", "length", "abort", "error"}
            assert found["tsqp:requests_added_total",] == 0

    asyncio.run(run())


def check(found: Samples) -> None:
    """What holds at every moment."""
    ended = sum(value for key, value in found.items() if key[0] == "vllm:request_success_total")
    waiting, running = found["vllm:num_requests_waiting",], found["vllm:num_requests_running",]
    assert found["tsqp:requests_added_total",] == waiting + running + ended
    assert all(value >= 0 for value in found.values())
    assert 0 <= found["vllm:kv_cache_usage_perc",] <= 1


def test_added_is_waiting_and_running_and_ended_whatever_clients_do() -> None:
    dice = random.Random(5)

    async def client(model: AsyncLLM) -> None:
        tokens = [dice.randrange(300) for _ in range(dice.randrange(1, 40))]
        params = SamplingParams(max_tokens=dice.randrange(1, 20), ignore_eos=True)
        try:
            async with await model.open(tokens, params) as answer:
                stays = dice.randrange(12)
                async for _ in answer:
                    stays -= 1
                    if not stays:
                        return
        except QueueFull:
            await asyncio.sleep(0)

    async def leave_one(model: AsyncLLM) -> None:
        """Whatever the others were in time for, this one is left before its end."""
        with held(model):
            async with await model.open([1, 2], SamplingParams(max_tokens=20, ignore_eos=True)):
                while not model.counts().running:
                    await asyncio.sleep(0.001)

    async def run() -> None:
        async with AsyncLLM(local()) as model:
            meters = PrometheusMeters(model, "tiny")
            under_way = [asyncio.create_task(client(model)) for _ in range(40)]
            while not all(task.done() for task in under_way):
                check(samples(meters.page()))
                await asyncio.sleep(0.002)
                dice.choice(under_way).cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
            while model.counts().running or model.counts().waiting:
                await asyncio.sleep(0.001)
            check(before := samples(meters.page()))
            await leave_one(model)
            while model.counts().running:
                await asyncio.sleep(0.001)
            found = samples(meters.page())
            check(found)
            assert found["vllm:kv_cache_usage_perc",] == 0
            assert found[ENDED, "abort"] == before[ENDED, "abort"] + 1

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))


@pytest.mark.slow
def test_endpoints_and_engine_count_the_same_after_a_fuzz() -> None:
    """Streams that are read or left, requests that are dropped, refused or wrong, too many at once; over HTTP."""
    compute, limits = ComputeConfig(dtype="float32", kv_memory=1 << 20), Limits(running=4, waiting=8)
    model = AsyncLLM(LLM(str(chat_model()), protection="local", compute=compute, limits=limits))
    meters, outcomes = PrometheusMeters(model, "tiny"), Counter[str]()

    def sums() -> dict[str, float]:
        found = Counter[str]()
        for (name, *_), value in samples(meters.page()).items():
            found[name] += value  # type: ignore[assignment]
        return dict(found)

    async def run(url: str) -> None:
        limits = httpx.Limits(max_connections=16)
        async with httpx.AsyncClient(base_url=f"{url}/v1", timeout=LIMIT_S, limits=limits) as client:
            traffic = Traffic(client, NAME, random.randrange(2**31), outcomes)
            await asyncio.gather(*(traffic.one() for _ in range(80)))
            await crowd(client)

    async def crowd(client: httpx.AsyncClient) -> None:
        """Whatever came about so far: more than there may be at once, of which one is left."""
        long = {"model": NAME, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1900, "ignore_eos": True}
        short = {**long, "max_tokens": 5}
        while model.counts().running or model.counts().waiting:
            await asyncio.sleep(0.001)
        before = sums()["tsqp:requests_refused_total"]
        with held(model):
            asked = [asyncio.create_task(client.post("/chat/completions", json=long))]
            while not model.counts().running:
                await asyncio.sleep(0.001)
            asked += [asyncio.create_task(client.post("/chat/completions", json=short)) for _ in range(15)]
            while sums()["tsqp:requests_refused_total"] == before:
                await asyncio.sleep(0.001)
            asked[0].cancel()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        outcomes.update(f"status {answer.status_code}" for answer in answers if isinstance(answer, httpx.Response))

    try:
        with served(service_of(model, metrics=meters)) as url:
            asyncio.run(run(url))
            wait_until(lambda: not unbalanced(sums()))
            check(samples(meters.page()))
            ended = {key[1] for key, value in samples(meters.page()).items() if key[0] == ENDED and value}
            assert ended >= {"length", "abort"}
            assert outcomes["status 429"]
            assert sums()["tsqp:requests_refused_total"] >= outcomes["status 429"]
    finally:
        asyncio.run(model.close(0))


@pytest.fixture
def meters() -> Iterator[PrometheusMeters]:
    model = AsyncLLM(local())
    yield PrometheusMeters(model, "tiny")
    asyncio.run(model.close())


def test_what_endpoints_tell_is_there(meters: PrometheusMeters) -> None:
    for _ in range(2):
        meters.began("chat")
        meters.first_token(0.3)
        meters.token(0.004)
    meters.ended("stop", 7, 3, 1.5)
    meters.ended("abort", 7, 0, 0.1)
    for status in (200, 429, 200):
        meters.answered(status)
    found = samples(meters.page())
    assert found["tsqp:answers_begun_total", "chat"] == 2
    assert (found["tsqp:http_answers_total", "200"], found["tsqp:http_answers_total", "429"]) == (2, 1)
    assert found["vllm:time_to_first_token_seconds_count",] == 2
    assert found["vllm:time_to_first_token_seconds_bucket", "0.2"] == 0
    assert found["vllm:time_to_first_token_seconds_bucket", "0.5"] == 2
    assert found["vllm:inter_token_latency_seconds_sum",] == pytest.approx(0.008)
    assert found["vllm:e2e_request_latency_seconds_sum",] == pytest.approx(1.6)
    assert found["vllm:request_prompt_tokens_sum",] == 14
    assert found["vllm:request_generation_tokens_sum",] == 3


def test_losses_and_cheats_show(meters: PrometheusMeters, monkeypatch: pytest.MonkeyPatch) -> None:
    expelled = {"tcp://canary:1": "canary"}
    figures: dict[str, Any] = {"losses": 5, "reconnects": 4, "pauses": 2, "failed_checks": 3}
    state = worker_state("reconnecting", **figures, paused_s=1.5, expelled=expelled)
    monkeypatch.setattr(AsyncLLM, "worker_state", state)
    page = meters.page()
    found = samples(page)
    assert (found["tsqp:worker_up",], found["tsqp:workers_expelled",]) == (0, 1)
    assert (found["tsqp:worker_losses_total",], found["tsqp:worker_reconnects_total",]) == (5, 4)
    assert (found["tsqp:pauses_total",], found["tsqp:paused_seconds_total",]) == (2, 1.5)
    assert found["tsqp:failed_checks_total",] == 3
    assert b"canary" not in page


def test_a_worker_that_is_there_shows(meters: PrometheusMeters, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AsyncLLM, "worker_state", worker_state("ready"))
    assert samples(meters.page())["tsqp:worker_up",] == 1


def test_without_a_worker_to_be_nothing_is_said_of_one(meters: PrometheusMeters) -> None:
    assert b"tsqp:worker" not in meters.page()


def test_the_page_is_what_prometheus_reads(meters: PrometheusMeters) -> None:
    answer = ask(Starlette(routes=[metrics_route(meters)]), "/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    check(samples(answer.content))
