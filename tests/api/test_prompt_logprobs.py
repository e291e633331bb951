"""How likely a prompt is, in parts of passes with others, is what its logits say that are computed alone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.families import random_tokens, tiny_model
from tests.prompt_logprobs import prompt_logprobs
from tests.trusted.guard.hostile import serve
from tsqp import LLM, ComputeConfig, Limits, SamplingParams

MODEL = str(tiny_model("llama").directory)
PROMPTS = [random_tokens(50), random_tokens(1, seed=1), random_tokens(9, seed=2)]
ASKED = SamplingParams(max_tokens=3, prompt_logprobs=3, ignore_eos=True)


@pytest.fixture(autouse=True)
def _in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsqp.trusted.engine.request.ROWS_WITH_LOGITS", 16)


@pytest.mark.parametrize(
    ("protection", "partition"),
    [("local", None), ("open", "linear"), ("open", "layer"), ("verified", "linear"), ("masked", "linear")],
)
def test_a_prompt_is_as_likely_as_its_logits_say(protection: Any, partition: Any) -> None:
    compute = ComputeConfig(partition=partition) if partition else ComputeConfig(dtype="float32")
    with serve(MODEL) as (_, address):
        worker = None if protection == "local" else address
        with LLM(MODEL, protection=protection, worker=worker, compute=compute, limits=Limits(prefill_rows=7)) as llm:
            completions = llm.generate(PROMPTS, ASKED)
            plain = llm.generate(PROMPTS, SamplingParams(max_tokens=3, ignore_eos=True))
            for prompt, completion, other in zip(PROMPTS, completions, plain, strict=True):
                assert completion.token_ids == other.token_ids
                assert other.prompt_logprobs is None
                expected = prompt_logprobs(llm.logits(prompt), prompt, 3)
                assert completion.prompt_logprobs is not None
                assert completion.prompt_logprobs[0] is None
                assert len(completion.prompt_logprobs) == len(prompt)
                for ours, theirs in zip(completion.prompt_logprobs[1:], expected[1:], strict=True):
                    assert ours is not None
                    assert theirs is not None
                    assert (ours.token, len(ours.top)) == (theirs.token, 3)
                    assert ours.logprob == pytest.approx(theirs.logprob, abs=0.02)
                    if protection in ("verified", "masked"):
                        assert ours == theirs
