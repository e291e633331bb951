"""Micro-batches change the order of work and never its result."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import StartWorker
from tests.families import FAMILIES, random_tokens, tiny_model
from tsqp import LLM, ComputeConfig, SamplingParams
from tsqp.api.config import PartitionName
from tsqp.config.partition import PARTITIONS

PROMPTS = [random_tokens(50), random_tokens(9, seed=1), random_tokens(33, seed=2)]
GREEDY = SamplingParams(max_tokens=16)


def run(
    family: str, partition: PartitionName, micro_batches: int, start_worker: StartWorker
) -> tuple[list[tuple[int, ...]], torch.Tensor, dict[str, object]]:
    directory = tiny_model(family).directory
    with LLM(
        str(directory),
        protection="open",
        worker=start_worker(directory),
        compute=ComputeConfig(partition=partition, dtype="float32", prefill_chunk=40, micro_batches=micro_batches),
    ) as llm:
        tokens = [completion.token_ids for completion in llm.generate(PROMPTS, GREEDY)]
        llm.stats.reset()
        logits = llm.logits(PROMPTS[0])
        return tokens, logits, llm.stats.as_dict()


@pytest.mark.parametrize("micro_batches", [2, 3, 64])
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_tokens_and_logits_are_those_of_one_batch(
    family: str, partition: PartitionName, micro_batches: int, start_worker: StartWorker
) -> None:
    tokens, logits, _ = run(family, partition, micro_batches, start_worker)
    one_tokens, one_logits, _ = run(family, partition, 1, start_worker)
    assert tokens == one_tokens
    assert float((logits - one_logits).norm() / one_logits.norm()) <= 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, start_worker: StartWorker) -> None:
    tokens, logits, _ = run(family, "linear", 3, start_worker)
    expected = tiny_model(family).logits(PROMPTS[0])
    assert float((logits - expected).norm() / expected.norm()) <= 1e-4
    assert [list(t) for t in tokens] == [tiny_model(family).greedy(prompt, 16) for prompt in PROMPTS]


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_calls_are_those_of_the_design(micro_batches: int, start_worker: StartWorker) -> None:
    _, _, stats = run("llama", "linear", micro_batches, start_worker)  # 50 rows in chunks of 40: two
    assert stats["rpc_calls"] == 4 * 2 * 2 * micro_batches + 1
    assert (stats["chunks"], stats["micro_batches"]) == (2, micro_batches)
