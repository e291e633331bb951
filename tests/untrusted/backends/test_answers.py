"""Answers of a whole model, in every mode and partition, by a worker over the fake driver: those of a CPU worker."""

from __future__ import annotations

import pytest

from tests.conftest import StartWorker
from tests.families import random_tokens
from tests.untrusted.fake_driver import FakeDriver
from tests.untrusted.shm_worker import fake_backend, serving
from tsqp import LLM, ComputeConfig, SamplingParams, WorkerConfig
from tsqp.config.partition import PartitionName
from tsqp.config.protection import ProtectionName

MODEL = "synthetic:tiny"


def tokens(address: str, protection: ProtectionName, partition: PartitionName) -> list[list[int]]:
    compute = ComputeConfig(partition=partition, dtype="float32" if protection == "open" else "auto")
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    with LLM(MODEL, protection=protection, worker=WorkerConfig(address, patience_s=0), compute=compute) as llm:
        return [list(answer.token_ids) for answer in llm.generate([random_tokens(20), random_tokens(3)], params)]


@pytest.mark.parametrize(
    ("protection", "partition"),
    [
        ("open", "layer"),
        ("open", "op"),
        ("open", "linear"),
        pytest.param("verified", "linear", marks=pytest.mark.slow),
        pytest.param("masked", "linear", marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_a_worker_on_the_cpu(
    protection: ProtectionName, partition: PartitionName, start_worker: StartWorker
) -> None:
    driver = FakeDriver()
    with serving(fake_backend(driver)) as (listener, _):
        found = tokens(listener.address, protection, partition)
    assert driver.registered == {}
    assert driver.idle
    assert driver.replayed > 0
    assert found == tokens(start_worker(MODEL), protection, partition)
