"""Several GPUs in one worker: the same bits as on the CPU where products are integers. And their copies, on one GPU."""

from __future__ import annotations

import mmap

import pytest
import torch

from tsqp import LLM, ComputeConfig, SamplingParams, WorkerConfig
from tsqp.config.protection import ProtectionName
from tsqp.untrusted.backends.driver import Stream
from tsqp.untrusted.backends.torch_driver import TorchDriver

MODEL = "synthetic:tiny"
PROMPT = [5, 17, 250, 3, 99, 42, 7, 8, 9, 1, 2, 30, 31, 32, 33, 34, 35, 36, 37]


@pytest.fixture
def devices() -> str:
    """All of this machine."""
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("there is one CUDA device here, and this needs two")
    return ",".join(f"cuda:{index}" for index in range(count))


@pytest.mark.parametrize("protection", ["verified", "masked"])
def test_answers_are_those_of_a_worker_on_the_cpu(protection: ProtectionName, devices: str) -> None:
    params = SamplingParams(max_tokens=12, logprobs=3)
    answers = []
    for where in ("cpu", devices):
        with LLM(MODEL, protection=protection, worker=WorkerConfig(device=where)) as llm:
            assert llm.session is not None
            assert llm.session.welcome.device == where
            answers.append(llm.generate([PROMPT, PROMPT[:5]], params))
    assert answers[0] == answers[1]


def test_open_answers_are_near_those_of_a_worker_on_the_cpu(devices: str) -> None:
    found = []
    for where in ("cpu", devices):
        compute = ComputeConfig(dtype="float32")
        with LLM(MODEL, protection="open", compute=compute, worker=WorkerConfig(device=where)) as llm:
            (completion,) = llm.generate([PROMPT], SamplingParams(max_tokens=4))
            found.append(completion.token_ids)
    assert found[0] == found[1]


@pytest.mark.parametrize("rows", [2, 300])
def test_rows_are_copied_to_where_they_lie_apart(rows: int, device: torch.device) -> None:
    """In memory that is locked for the device, as an arena's is. This needs one GPU."""
    driver, pitch, first, width = TorchDriver(device), 12_288, 1_024, 4_096
    with mmap.mmap(-1, 4 << 20) as memory:
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        assert driver.register(whole) is None
        product = torch.randint(0, 256, (rows, width), dtype=torch.uint8, device=device)
        torch.cuda.synchronize(device)
        driver.copy_rows(whole.as_strided((rows, width), (pitch, 1), first), product, Stream.OUT)
        driver.synchronise(driver.record(Stream.OUT))
        expected = torch.zeros(rows, pitch, dtype=torch.uint8)
        expected[:, first : first + width] = product.cpu()
        assert torch.equal(whole[: rows * pitch].view(rows, pitch), expected)
        driver.unregister(whole)
        del whole
