"""The two tables of a run add up: no time is counted twice, whatever is in flight together."""

from __future__ import annotations

import pytest

from tests.conftest import StartWorker
from tests.families import random_tokens, tiny_model
from tsqp import LLM, ComputeConfig, SamplingParams
from tsqp.api.config import PartitionName
from tsqp.config.partition import PARTITIONS
from tsqp.trusted.stats import Stats, total


def measured(partition: PartitionName | None, micro_batches: int, start_worker: StartWorker) -> Stats:
    directory = tiny_model("llama").directory
    compute = ComputeConfig(partition or "linear", dtype="float32", micro_batches=micro_batches)
    worker = None if partition is None else start_worker(directory)
    with LLM(str(directory), protection="open" if partition else "local", worker=worker, compute=compute) as llm:
        llm.generate([random_tokens(60), random_tokens(9)], SamplingParams(max_tokens=4))
        return llm.stats


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("partition", [None, *PARTITIONS])
def test_the_rows_make_the_whole(
    partition: PartitionName | None, micro_batches: int, start_worker: StartWorker
) -> None:
    stats = measured(partition, micro_batches, start_worker)
    whole = stats.prefill_s + stats.decode_s
    known = total(stats.calls.values()).held_s + sum(stats.operator_s.values())
    assert 0 < known <= whole
    assert stats.other_s == pytest.approx(whole - known)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_every_call_is_counted_both_ways(partition: PartitionName, start_worker: StartWorker) -> None:
    for kind, row in measured(partition, 1, start_worker).calls.items():
        if row.count and kind not in ("layer",):
            assert row.bytes_sent > 0
            assert row.rpc_s > 0
            assert 0 <= row.serialise_s <= row.rpc_s
