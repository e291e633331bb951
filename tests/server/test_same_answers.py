"""In the private modes a request is answered alike alone and in company, to the last digit of its log-probabilities."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.commands import LIMIT_S, Home
from tests.families import random_tokens
from tests.server.chat_model import chat_model
from tests.server.mixed import SHARED, mixed
from tests.server.process import serving
from tests.server.reading import Asked, Streams, metrics, read
from tests.trusted.guard.fakes import MODES
from tsqp.api.config import ProtectionName

REQUESTS = 32
TOKENS = 100
KV_MEMORY = "1MiB"  # for eight times 256 positions of this model
LITTLE_KV_MEMORY = "256KiB"  # for twice


def asked(number: int, salt: str) -> Asked:
    """It finds what others with this salt have left, and no more."""
    path, body = mixed(number, TOKENS)
    return Asked(path, {**body, "cache_salt": salt})


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_thirty_two_at_once_are_answered_as_each_alone(home: Home, mode: ProtectionName) -> None:
    """Chat and completions, greedy and seeded, log-probabilities, forms, stops; kept beginnings, little memory."""
    options = ("--model", chat_model(), "--served-model-name", "chat", "--port", 0, "--metrics-port", 0)
    memory = ("--protection", mode, "--kv-memory", KV_MEMORY)
    with serving(home, *options, *memory) as server, ThreadPoolExecutor(REQUESTS) as pool:
        alone = [read(server.address, asked(number, f"alone {number}")) for number in range(REQUESTS)]
        assert all(told.done and told.error is None for told in alone)
        assert {told.finish_reason for told in alone} == {"stop", "length"}
        found = metrics(server.metrics_address)
        assert (found["vllm:prefix_cache_hits_total"], found["vllm:num_preemptions_total"]) == (0, 0)
        share = [number for number in range(REQUESTS) if SHARED in str(asked(number, "").body)]
        others = [number for number in range(REQUESTS) if number not in share]
        random.shuffle(others)
        read(server.address, asked(share[0], ""))  # leaves a beginning to those that share it
        first = Streams(pool, server.address, [asked(number, "") for number in share])
        first.wait_for(len(share))
        then = Streams(pool, server.address, [asked(number, "") for number in others])
        together = dict(zip([*share, *others], [*first.told(), *then.told()], strict=True))
        for number, expected in enumerate(alone):
            assert together[number] == expected, asked(number, "")
        found = metrics(server.metrics_address)
        assert found["vllm:prefix_cache_hits_total"] > len(SHARED)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_one_that_loses_its_cache_in_the_middle_is_answered_as_alone(home: Home, mode: ProtectionName) -> None:
    """Each of two comes to need all the memory there is, so no two are ever done without one having given way."""
    options = ("--model", chat_model(), "--served-model-name", "chat", "--port", 0, "--metrics-port", 0)
    memory = ("--protection", mode, "--kv-memory", LITTLE_KV_MEMORY)
    prompts = [[*random_tokens(20, seed)] for seed in range(2)]
    common = {"model": "chat", "max_tokens": 300, "ignore_eos": True, "temperature": 1, "seed": 1, "logprobs": 2}

    def answers(address: str, *asked: list[int], salt: str) -> list[dict[str, Any]]:
        body = {**common, "prompt": [*asked], "cache_salt": salt}
        answer = httpx.post(f"{address}/v1/completions", json=body, timeout=LIMIT_S)
        assert answer.status_code == 200, answer.text
        return [{**choice, "index": 0} for choice in answer.json()["choices"]]

    with serving(home, *options, *memory) as server:
        alone = [answers(server.address, prompt, salt=str(seed))[0] for seed, prompt in enumerate(prompts)]
        assert metrics(server.metrics_address)["vllm:num_preemptions_total"] == 0
        assert answers(server.address, *prompts, salt="together") == alone
        assert metrics(server.metrics_address)["vllm:num_preemptions_total"] > 0
