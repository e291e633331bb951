"""A server whose worker is killed under its streams: clients see a pause, and the answers of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.commands import LIMIT_S, Home, children, wait_gone
from tests.server.chat_model import IM_END, chat_model
from tests.server.process import Serving, serving

STREAMS = 8
KILLS = 3
TOKENS = 240


class Told(NamedTuple):
    """What a client makes of a stream."""

    text: str
    finish_reason: str
    usage: dict[str, Any]


def stream(server: Serving, seed: int, arrived: Callable[[int], None] = lambda _: None) -> Told:
    """One stream, read to its end; ``arrived`` is told the number of each piece of text."""
    body = {
        "model": "chat",
        "messages": [{"role": "user", "content": f"number {seed}"}],
        "max_tokens": TOKENS,
        "temperature": 1.0,
        "seed": seed,
        "logit_bias": {str(IM_END): -100},
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    usage: dict[str, Any] = {}
    text, reason, pieces = "", "", 0
    with httpx.stream("POST", f"{server.address}/v1/chat/completions", json=body, timeout=LIMIT_S) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
                reason = choice["finish_reason"] or reason
            if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                pieces += 1
                arrived(pieces)
            usage = chunk["usage"] or usage
    return Told(text, reason, usage)


def metrics(server: Serving) -> dict[str, float]:
    assert server.metrics_address is not None
    families = text_string_to_metric_families(httpx.get(server.metrics_address, timeout=LIMIT_S).text)
    return {sample.name: sample.value for family in families for sample in family.samples}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("protection", ["masked", "verified"])
def test_streams_outlive_their_workers(home: Home, protection: str) -> None:
    options = ("--model", chat_model(), "--served-model-name", "chat", "--port", 0, "--metrics-port", 0)
    with serving(home, *options, "--protection", protection) as server, ThreadPoolExecutor(STREAMS) as pool:
        undisturbed = [stream(server, seed) for seed in range(STREAMS)]
        assert {told.finish_reason for told in undisturbed} == {"length"}
        moments = [
            threading.Semaphore(0) for _ in range(KILLS)
        ]  # of each: released by every stream that has come so far

        def arrived(pieces: int) -> None:
            if pieces % 40 == 5 and pieces // 40 < KILLS:
                moments[pieces // 40].release()

        streams = [pool.submit(stream, server, seed, arrived) for seed in range(STREAMS)]
        for moment in moments:
            assert moment.acquire(timeout=LIMIT_S)  # one of them is there: the others are at other places
            (worker,) = children(server.process.pid)
            os.kill(worker, signal.SIGKILL)
            wait_gone(worker)
        assert [told.result(LIMIT_S) for told in streams] == undisturbed
        found = metrics(server)
        assert found["tsqp:worker_losses_total"] == found["tsqp:worker_reconnects_total"] == KILLS
        assert (found["tsqp:worker_up"], found["tsqp:failed_checks_total"]) == (1, 0)
        assert httpx.get(f"{server.address}/readyz", timeout=LIMIT_S).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() == 0
