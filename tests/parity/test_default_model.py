"""The default model against transformers on the original GGUF: the converter is tested with the decoder."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch

from tests.conftest import prose
from tests.default_gguf import default_gguf
from tsqp import LLM, ComputeConfig, SamplingParams
from tsqp.api.config import ProtectionName

PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea, then explain it — in detail.",
    "def fibonacci(n):",
]
STEPS = 48
POSITIONS = 1024
MINIMUM_AGREEMENT = 0.95


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers with the GGUF that our default model is converted from, dequantised to float32."""
    from transformers import AutoModelForCausalLM, GgufConfig

    gguf = default_gguf(tmp_path_factory.mktemp("gguf"))
    return AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()


@cache
def greedy(oracle: Any, tokens: tuple[int, ...]) -> list[int]:
    ids = torch.tensor([tokens])
    out = oracle.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, do_sample=False)
    return out[0, len(tokens) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("protection", ["local", "open"])
def test_same_greedy_continuation_in_float32(oracle: Any, protection: ProtectionName) -> None:
    with LLM("default", protection=protection, compute=ComputeConfig(dtype="float32", threads=1)) as llm:
        eos = set(llm.tokenizer.eos_token_ids)
        for completion in llm.generate(PROMPTS, SamplingParams(max_tokens=STEPS)):
            expected = greedy(oracle, completion.prompt_token_ids)
            assert list(completion.token_ids) == [token for token in expected if token not in eos]


@pytest.mark.slow
def test_bfloat16_agrees_on_the_next_token_of_real_text(oracle: Any) -> None:
    with LLM("default", protection="open", compute=ComputeConfig(dtype="bfloat16", threads=1)) as llm:
        tokens = llm.tokenizer.encode(prose())[:POSITIONS]
        assert len(tokens) == POSITIONS
        ours = llm.logits(tokens).argmax(-1)
    narrow = copy.deepcopy(oracle).to(torch.bfloat16)  # in place, it would narrow the other tests' oracle too
    with torch.no_grad():
        theirs = narrow(torch.tensor([tokens])).logits[0].argmax(-1)
    assert float((ours == theirs).float().mean()) >= MINIMUM_AGREEMENT


def test_the_prose_is_long_enough_for_quality_tests() -> None:
    with LLM("default", protection="local") as llm:
        assert len(llm.tokenizer.encode(prose())) >= 4096
