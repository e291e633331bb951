"""The number of calls of a forward pass is exactly what the design says."""

from __future__ import annotations

import pytest

from tests.conftest import StartWorker
from tests.families import random_tokens, tiny_model
from tsqp import LLM, ComputeConfig, SamplingParams
from tsqp.api.config import PartitionName
from tsqp.config.partition import PARTITIONS

PROMPT = random_tokens(20)
LAYERS = 2
EXPECTED = {"op": 9 * LAYERS + 2, "batched": 6 * LAYERS + 2, "linear": 4 * LAYERS + 1, "layer": LAYERS + 2}
PER_LAYER = {"op": 9, "batched": 6, "linear": 4, "layer": 1}


def stats_of(partition: PartitionName, chunk: int, new_tokens: int, start_worker: StartWorker) -> dict[str, object]:
    directory = tiny_model("llama").directory
    with LLM(
        str(directory),
        protection="open",
        worker=start_worker(directory),
        compute=ComputeConfig(partition=partition, dtype="float32", prefill_chunk=chunk),
    ) as llm:
        llm.generate(PROMPT, SamplingParams(max_tokens=new_tokens))
        return llm.stats.as_dict()


def test_98_calls_for_16_layers() -> None:
    assert PARTITIONS["batched"].calls_per_pass(16) == 98
    assert PARTITIONS["op"].calls_per_pass(16) == 9 * 16 + 2
    assert PARTITIONS["linear"].calls_per_pass(16) == 4 * 16 + 1


@pytest.mark.parametrize("partition", EXPECTED)
def test_prefill(partition: PartitionName, start_worker: StartWorker) -> None:
    stats = stats_of(partition, 2048, 1, start_worker)
    assert (stats["rpc_calls"], stats["forward_passes"], stats["chunks"]) == (EXPECTED[partition], 1, 1)
    assert PARTITIONS[partition].calls_per_pass(LAYERS) == EXPECTED[partition]


@pytest.mark.parametrize("partition", EXPECTED)
def test_every_decode_step(partition: PartitionName, start_worker: StartWorker) -> None:
    stats = stats_of(partition, 2048, 5, start_worker)  # one prefill and four decode passes
    assert (stats["rpc_calls"], stats["forward_passes"]) == (5 * EXPECTED[partition], 5)


@pytest.mark.parametrize("partition", EXPECTED)
def test_chunks_multiply_the_calls_per_layer(partition: PartitionName, start_worker: StartWorker) -> None:
    stats = stats_of(partition, 7, 1, start_worker)  # 20 rows in chunks of 7
    once = EXPECTED[partition] - PER_LAYER[partition] * LAYERS
    assert (stats["rpc_calls"], stats["chunks"]) == (3 * LAYERS * PER_LAYER[partition] + once, 3)
    assert PARTITIONS[partition].calls_per_pass(LAYERS, chunks=3) == stats["rpc_calls"]


def test_bytes_are_those_of_the_hidden_states(start_worker: StartWorker) -> None:
    stats = stats_of("linear", 2048, 1, start_worker)
    hidden, inner, kv, vocab, rows, item = 64, 96, 32, 320, len(PROMPT), 4
    received = LAYERS * rows * (hidden + 2 * kv + hidden + 2 * inner + hidden) * item + vocab * item
    sent = LAYERS * rows * (hidden + hidden + hidden + inner) * item + hidden * item
    calls = 4 * LAYERS + 1
    assert stats["bytes_received"] == received
    assert sent < int(str(stats["bytes_sent"])) <= sent + calls * 64  # and a control frame of a few dozen bytes each
