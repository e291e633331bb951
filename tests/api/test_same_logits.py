"""Thirty-two requests of every kind at once have the logits that each has alone, bit for bit, in the private modes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.commands import LIMIT_S
from tests.families import random_tokens
from tests.server.chat_model import IM_END, chat_model
from tests.trusted.guard.fakes import MODES
from tests.trusted.guard.hostile import serve
from tsqp import LLM, AsyncLLM, Completion, ComputeConfig, Limits, SamplingParams, StructuredOutputsParams
from tsqp.api.answer import Answer
from tsqp.api.config import ProtectionName
from tsqp.trusted.engine.sampling import Sampler

REQUESTS = 32
SHARED = random_tokens(40, seed=99)  # a beginning that some prompts have in common
KINDS: tuple[dict[str, Any], ...] = (
    {"ignore_eos": True},
    {"temperature": 1.0, "ignore_eos": True},
    {"temperature": 0.7, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "logprobs": 3},
    {"temperature": 1.0, "frequency_penalty": 0.6, "presence_penalty": -0.4, "repetition_penalty": 1.2},
    {"temperature": 1.0, "stop": ("a", "e", "\n"), "logit_bias": {97: 2.0, IM_END: -100.0}},
    {
        "temperature": 1.0,
        "structured_outputs": StructuredOutputsParams(regex="(red|green|blue)( and (red|green)){1,3}"),
    },
    {"logprobs": 0, "stop_token_ids": (33, 77)},
    {"prompt_logprobs": 1},
)


@dataclass
class Recording:
    """A sampler that keeps the logits it was asked about."""

    sampler: Sampler
    logits: list[torch.Tensor] = field(default_factory=list)

    def choose(self, logits: torch.Tensor, text: Sequence[int]) -> int:
        self.logits.append(logits.clone())
        return self.sampler.choose(logits, text)


class Recorded(LLM):
    """Keeps what each request is made of, by its prompt."""

    recordings: dict[tuple[int, ...], Recording]

    def new_answers(
        self, prompts: Sequence[list[int]], params: SamplingParams, **more: Any
    ) -> list[tuple[Answer, Any]]:
        made = []
        for prompt, (answer, sampler) in zip(prompts, super().new_answers(prompts, params, **more), strict=True):
            self.recordings[tuple(prompt)] = Recording(sampler)
            made.append((answer, self.recordings[tuple(prompt)]))
        return made


def shares(number: int) -> bool:
    """Whether it has the beginning that others have."""
    return number % 5 == 3


def asked(number: int) -> tuple[list[int], SamplingParams]:
    """Lengths are from 3 to 96 tokens."""
    prompt = random_tokens(3 + number * 17 % 94, seed=number)
    prompt = [*SHARED, *prompt[:56]] if shares(number) else prompt
    return prompt, SamplingParams(max_tokens=20 + number % 7, seed=number, **KINDS[number % len(KINDS)])


Answered = tuple[Completion, list[torch.Tensor]]


async def answered(model: AsyncLLM, llm: Recorded, number: int, salt: str | None, begun: asyncio.Event) -> Answered:
    """What comes of a request; ``begun`` is set by its first token."""
    prompt, params = asked(number)
    async with await model.open(prompt, params, salt=salt) as answer:
        async for delta in answer:
            begun.set()
            if delta.completion is not None:
                return delta.completion, llm.recordings[tuple(prompt)].logits
    raise AssertionError("an answer without an end")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_thirty_two_at_once(mode: ProtectionName, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a kept beginning, and so little memory that requests lose their caches and are computed again."""
    monkeypatch.setattr("tsqp.model.cache.GROW_ROWS", 16)

    async def run(llm: Recorded) -> None:
        async with AsyncLLM(llm) as model:
            begun = asyncio.Event()
            alone = [await answered(model, llm, number, f"alone {number}", begun) for number in range(REQUESTS)]
            counts = model.counts()
            assert (counts.found_tokens, counts.preemptions) == (0, 0)
            assert {completion.finish_reason for completion, _ in alone} == {"stop", "length"}
            await answered(model, llm, 3, "", begun)  # leaves the beginning
            order = [number for number in range(REQUESTS) if shares(number)]
            others = [number for number in range(REQUESTS) if not shares(number)]
            random.shuffle(others)
            begun.clear()
            tasks = {n: asyncio.create_task(answered(model, llm, n, "", begun)) for n in order}
            await begun.wait()
            tasks |= {n: asyncio.create_task(answered(model, llm, n, None, begun)) for n in others}
            for number, (expected, logits) in enumerate(alone):
                completion, found = await tasks[number]
                assert completion == expected
                assert len(found) == len(logits)
                assert all(torch.equal(one, other) for one, other in zip(found, logits, strict=True))
            counts = model.counts()
            assert counts.found_tokens >= len(SHARED)
            assert counts.preemptions > 0, counts

    with serve(str(chat_model()), transport="shm") as (_, address):
        compute = ComputeConfig(kv_memory=130_000)
        limits = Limits(prefill_rows=20)
        llm = Recorded(str(chat_model()), protection=mode, worker=address, compute=compute, limits=limits)
        llm.recordings = {}
        asyncio.run(asyncio.wait_for(run(llm), LIMIT_S))
