"""The private modes of the families and rotary embeddings that are not Llama's: to the same bits as each other."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import StartWorker
from tests.families import random_tokens, tiny_model
from tsqp import LLM, ComputeConfig, GuardConfig, SamplingParams
from tsqp.trusted.decode_step import DecodeStep

# Each has something that no other of them has.
STEPPED = ("yarn", "dynamic-rope", "smollm3", "phi3-longrope", "granite", "helium")  # by the compiled decode step
# Whose blocks the loop of the decode step does not know.
PLAIN = ("arcee", "olmo2", "gemma2", "gemma3", "cohere", "cohere2")
PROMPT = random_tokens(38)
LONG = random_tokens(60, seed=1)  # past the original context, and past every window, from its middle on
GREEDY = SamplingParams(max_tokens=12)  # past the original context of those that have one
CLOSE = 0.05  # 8-bit weights and activations

Answer = tuple[list[torch.Tensor], list[tuple[int, ...]], bool]


def answer(family: str, protection: str, address: str, *, compiled_step: bool = True) -> Answer:
    """Logits of both prompts, the tokens after each, and whether a compiled loop took their steps."""
    with LLM(
        str(tiny_model(family).directory),
        protection=protection,  # type: ignore[arg-type]
        worker=address,
        guard=GuardConfig(compiled_step=compiled_step),
        compute=ComputeConfig(kv_dtype="float32", prefill_chunk=16),
    ) as llm:
        stepped = isinstance(llm.engine.decoder._step, DecodeStep)  # type: ignore[attr-defined]
        prompts = (PROMPT, LONG)
        tokens = [tuple(answer.token_ids) for answer in llm.generate(prompts, GREEDY)]
        return [llm.logits(prompt) for prompt in prompts], tokens, stepped


@pytest.mark.parametrize("family", STEPPED + PLAIN)
def test_masked_is_verified_bit_for_bit(family: str, start_worker: StartWorker) -> None:
    address = start_worker(tiny_model(family).directory, "shm", dtype="field")
    masked = answer(family, "masked", address)
    assert masked[2] == (family in STEPPED)
    others = [answer(family, "verified", address)]
    if family in STEPPED:
        others.append(answer(family, "verified", address, compiled_step=False))
    for logits, tokens, _ in others:
        for ours, theirs in zip(logits, masked[0], strict=True):
            assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
        assert tokens == masked[1]
    for prompt, found in zip((PROMPT, LONG), masked[0], strict=True):
        expected = tiny_model(family).logits(prompt)
        assert (found - expected).norm() <= CLOSE * expected.norm()
