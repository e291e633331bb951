"""One model used from several threads at once: the passes take turns and every answer is whole."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import StartWorker
from tests.families import random_tokens, tiny_model
from tsqp import LLM, ComputeConfig, SamplingParams


@pytest.mark.parametrize("transport", ["mem", "shm", "ipc"])
def test_threads_take_turns(transport: str, start_worker: StartWorker) -> None:
    model = tiny_model("llama")
    prompts = [random_tokens(5 + seed, seed) for seed in range(6)]
    address = start_worker(model.directory, transport)
    with (
        LLM(str(model.directory), protection="open", worker=address, compute=ComputeConfig(dtype="float32")) as llm,
        ThreadPoolExecutor(3) as pool,
    ):
        answers = list(pool.map(lambda prompt: llm.generate(prompt, SamplingParams(max_tokens=12))[0], prompts))
    assert [list(answer.token_ids) for answer in answers] == [model.greedy(prompt, 12) for prompt in prompts]
