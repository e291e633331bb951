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
PLAIN = ("arcee", "olmo2")  # whose blocks the loop of the decode step does not know
PROMPT = random_tokens(38)
GREEDY = SamplingParams(max_tokens=12)  # past the original context of those that have one
CLOSE = 0.05  # 8-bit weights and activations

Answer = tuple[torch.Tensor, tuple[int, ...], bool]


def answer(family: str, protection: str, address: str, *, compiled_step: bool = True) -> Answer:
    """Logits of the prompt, the tokens after it, and whether a compiled loop took their steps."""
    with LLM(
        str(tiny_model(family).directory),
        protection=protection,  # type: ignore[arg-type]
        worker=address,
        guard=GuardConfig(compiled_step=compiled_step),
        compute=ComputeConfig(kv_dtype="float32", prefill_chunk=16),
    ) as llm:
        stepped = isinstance(llm.engine.decoder._step, DecodeStep)  # type: ignore[attr-defined]
        return llm.logits(PROMPT), llm.generate(PROMPT, GREEDY)[0].token_ids, stepped


@pytest.mark.parametrize("family", STEPPED + PLAIN)
def test_masked_is_verified_bit_for_bit(family: str, start_worker: StartWorker) -> None:
    address = start_worker(tiny_model(family).directory, "shm", dtype="field")
    masked = answer(family, "masked", address)
    assert masked[2] == (family in STEPPED)
    others = [answer(family, "verified", address)]
    if family in STEPPED:
        others.append(answer(family, "verified", address, compiled_step=False))
    for logits, tokens, _ in others:
        assert torch.equal(logits.view(torch.int32), masked[0].view(torch.int32))
        assert tokens == masked[1]
    expected = tiny_model(family).logits(PROMPT)
    assert (masked[0] - expected).norm() <= CLOSE * expected.norm()
