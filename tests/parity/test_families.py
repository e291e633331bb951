"""Every family, partition and transport against transformers, in float32."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import TRANSPORTS, StartWorker
from tests.families import CONTEXT, FAMILIES, MORE_FAMILIES, random_tokens, tiny_model
from tsqp import LLM, ComputeConfig, SamplingParams
from tsqp.api.config import PartitionName
from tsqp.config.partition import PARTITIONS

ALL = [*FAMILIES, *MORE_FAMILIES]
PROMPT = random_tokens(50)
STEPS = 32
TOLERANCE = 1e-4
GREEDY = SamplingParams(max_tokens=STEPS)


def relative_error(llm: LLM, family: str, tokens: list[int]) -> float:
    expected = tiny_model(family).logits(tokens)
    return float((llm.logits(tokens) - expected).norm() / expected.norm())


@pytest.mark.parametrize("chunk", [2048, 7], ids=["one-chunk", "chunks-of-7"])
@pytest.mark.parametrize("family", ALL)
def test_local(family: str, chunk: int) -> None:
    model = tiny_model(family)
    with LLM(
        str(model.directory), protection="local", compute=ComputeConfig(dtype="float32", prefill_chunk=chunk)
    ) as llm:
        assert relative_error(llm, family, PROMPT) <= TOLERANCE
        assert list(llm.generate(PROMPT, GREEDY)[0].token_ids) == model.greedy(PROMPT, STEPS)


# Every two of family, partition and transport: what a transport carries has the same shapes in every family.
SPLIT = [
    (family, partition, TRANSPORTS[(i + j) % len(TRANSPORTS)])
    for i, family in enumerate(ALL)
    for j, partition in enumerate(PARTITIONS)
]


@pytest.mark.parametrize(("family", "partition", "transport"), SPLIT)
def test_split(family: str, partition: PartitionName, transport: str, start_worker: StartWorker) -> None:
    model = tiny_model(family)
    address = start_worker(model.directory, transport)
    with LLM(
        str(model.directory),
        protection="open",
        worker=address,
        compute=ComputeConfig(partition=partition, dtype="float32", prefill_chunk=19),
    ) as llm:
        assert llm.session is not None
        assert (llm.session.transport, llm.session.address) == (transport, address)
        assert relative_error(llm, family, PROMPT) <= TOLERANCE
        assert list(llm.generate(PROMPT, GREEDY)[0].token_ids) == model.greedy(PROMPT, STEPS)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_a_batch_gives_what_each_prompt_gives_alone(partition: PartitionName, start_worker: StartWorker) -> None:
    model = tiny_model("mistral-window")
    prompts = [random_tokens(count, seed=count) for count in (1, 40, 9)]
    with LLM(
        str(model.directory),
        protection="open",
        worker=start_worker(model.directory),
        compute=ComputeConfig(partition=partition, dtype="float32", prefill_chunk=16),
    ) as llm:
        together = llm.generate(prompts, GREEDY)
    assert [list(c.token_ids) for c in together] == [model.greedy(prompt, STEPS) for prompt in prompts]


def test_generation_ends_with_the_context() -> None:
    model = tiny_model("llama")
    prompt = random_tokens(CONTEXT - 5)
    with LLM(str(model.directory), protection="local", compute=ComputeConfig(dtype="float32")) as llm:
        completion = llm.generate(prompt, SamplingParams(max_tokens=100))[0]
    assert (len(completion.token_ids), completion.finish_reason) == (5, "length")


@pytest.mark.parametrize(("dtype", "wire"), [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("float16", "float16")])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_narrow_dtypes_stay_close(partition: PartitionName, dtype: Any, wire: Any, start_worker: StartWorker) -> None:
    model = tiny_model("qwen3")
    with LLM(
        str(model.directory),
        protection="open",
        worker=start_worker(model.directory, dtype=dtype),
        compute=ComputeConfig(partition=partition, dtype=dtype, wire_dtype=wire),
    ) as llm:
        assert relative_error(llm, "qwen3", PROMPT) <= 0.05
