"""A worker on the GPU: the same integers as on the CPU, alive after it ran out of memory, and gone without a trace."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from tests.untrusted.calls import CHECKPOINT, CONFIG, HELLO, PEER, answer, arrival, greet
from tsqp import LLM, ComputeConfig, SamplingParams, WorkerConfig
from tsqp.arith.field import MAX_SMALL
from tsqp.arith.modulus import P
from tsqp.config.groups import GroupKey, linear_groups
from tsqp.config.protection import ProtectionName
from tsqp.launch.local import LocalWorker
from tsqp.untrusted.store import WeightStore
from tsqp.untrusted.worker import Worker
from tsqp.wire.codec import decode_reply
from tsqp.wire.messages import (
    PROTOCOL_VERSION,
    Begin,
    Done,
    Failed,
    Finish,
    Hello,
    Layer,
    Message,
    MultiplyPads,
    Place,
    Product,
    Welcome,
)

MODEL = "synthetic:tiny"
PROMPT = [5, 17, 250, 3, 99, 42, 7, 8, 9, 1, 2, 30, 31, 32, 33, 34, 35, 36, 37]
FIELD = Hello(PROTOCOL_VERSION, HELLO.fingerprint, "float32", "field")
KEYS: list[GroupKey] = [("qkv", 0), ("o", 0), ("gate_up", 1), ("down", 1), ("lm_head", None)]
RETURNED_WITHIN_S = 20.0
CONTEXT_BYTES = 64 << 20  # less than what a process on a GPU takes before it has any weights


def worker_on(device: torch.device) -> Worker:
    worker = Worker(WeightStore(CHECKPOINT, "float32", device))
    assert isinstance(greet(worker, FIELD), Welcome)
    return worker


def product(worker: Worker, message: Message, payload: torch.Tensor) -> bytes:
    frames = worker.answer(arrival(message, payload))
    assert frames is not None
    return bytes(frames.tensors[0])


def test_products_are_those_of_a_worker_on_the_cpu(device: torch.device) -> None:
    here, there = worker_on(torch.device("cpu")), worker_on(device)
    generator = torch.Generator().manual_seed(0)
    for key in KEYS:
        for rows in (1, 16, 70):
            shape = (rows, linear_groups(CONFIG)[key[0]].in_features)
            x = torch.randint(0, P, shape, generator=generator).to(torch.int32)
            small = torch.randint(-MAX_SMALL, MAX_SMALL + 1, shape, generator=generator).to(torch.int16)
            for call, payload in ((Product(1, *key, rows, 4), x), (Product(1, *key, rows, 2), small)):
                assert product(there, call, payload) == product(here, call, payload)
        keys = torch.randint(0, 256, (3, 32), dtype=torch.uint8, generator=generator)
        assert product(there, MultiplyPads(1, *key, 3), keys) == product(here, MultiplyPads(1, *key, 3), keys)


@pytest.mark.parametrize("protection", ["verified", "masked"])
def test_answers_over_shm_are_those_of_a_worker_on_the_cpu(protection: ProtectionName, device: torch.device) -> None:
    """Bit for bit: a worker returns integers, and all else is computed on this side."""
    params = SamplingParams(max_tokens=12, logprobs=3)
    answers = []
    for where in ("cpu", str(device)):
        with LLM(MODEL, protection=protection, worker=WorkerConfig(device=where)) as llm:
            answers.append(llm.generate([PROMPT, PROMPT[:5]], params))
    assert answers[0] == answers[1]


def test_open_answers_over_shm_are_near_those_of_a_worker_on_the_cpu(device: torch.device) -> None:
    params = SamplingParams(max_tokens=4, logprobs=1)
    compute = ComputeConfig(dtype="float32")
    found = []
    for where in ("cpu", str(device)):
        with LLM(MODEL, protection="open", compute=compute, worker=WorkerConfig(device=where)) as llm:
            (completion,) = llm.generate([PROMPT], params)
            found.append(completion)
    assert found[0].token_ids == found[1].token_ids


def test_layer_answers_over_shm_are_those_of_a_worker_on_the_cpu(device: torch.device) -> None:
    """Prompts, decode steps of two sequences as graphs, and one more; tokens, as the last bits may differ."""
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    compute = ComputeConfig(partition="layer", dtype="float32")
    found = []
    for where in ("cpu", str(device)):
        with LLM(MODEL, protection="open", compute=compute, worker=WorkerConfig(device=where)) as llm:
            answers = llm.generate([PROMPT, PROMPT[:5]], params) + llm.generate([PROMPT * 8], params)
            found.append([answer.token_ids for answer in answers])
    assert found[0] == found[1]


def test_decode_steps_are_captured_and_wait_for_nothing(device: torch.device) -> None:
    """Over torch's own driver: no operator of a pass but the last copy makes the host wait."""
    store = WeightStore(CHECKPOINT, "float32", device)
    worker = Worker(store)
    assert isinstance(greet(worker, HELLO), Welcome)
    tokens = torch.arange(30, dtype=torch.int32)
    with torch.inference_mode(), store.backend.serving():
        for position, rows in ((0, 30), (30, 1), (31, 1)):
            begin = Begin(100 * rows + position, (Place(1, position, rows),), 64)
            ask(worker, begin, tokens[:rows])
            torch.cuda.set_sync_debug_mode("error")
            try:
                for layer in range(CONFIG.num_layers):
                    ask(worker, Layer(1, begin.id, layer, 0))
            finally:
                torch.cuda.set_sync_debug_mode("default")
            ask(worker, Finish(2, begin.id, False))
    steps = worker._connections[PEER]._layers._compute.graphs._steps  # type: ignore[union-attr]
    assert len(steps) == 1
    assert not store.backend._graphs._refused  # type: ignore[attr-defined]


def ask(worker: Worker, message: Message, *payloads: torch.Tensor) -> None:
    frames = worker.answer(arrival(message, *payloads))
    assert frames is not None
    reply = decode_reply(frames.control)
    assert isinstance(reply, Done), reply


def test_out_of_memory_is_an_error_of_one_call(device: torch.device) -> None:
    worker = worker_on(device)
    shape = (4, linear_groups(CONFIG)["qkv"].in_features)
    call, x = Product(1, "qkv", 0, 4, 4), torch.zeros(shape, dtype=torch.int32)
    assert isinstance(answer(worker, call, x), Done)
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(1e-9, device)
        large = torch.zeros(8_192, shape[1], dtype=torch.int32)  # more than what blocks that are kept have room for
        reply = answer(worker, Product(2, "qkv", 0, len(large), 4), large)
        assert isinstance(reply, Failed)
        assert "memory" in reply.reason
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert isinstance(answer(worker, call, x), Done)


def test_a_killed_worker_leaves_its_device_memory(device: torch.device) -> None:
    def used() -> int:
        free, total = torch.cuda.mem_get_info(device)
        return total - free

    torch.cuda.synchronize()
    before = used()
    with LocalWorker(MODEL, device=str(device), dtype="field", threads=2) as worker:
        worker.wait_ready()
        assert used() > before + CONTEXT_BYTES
        worker.kill()
        assert becomes(lambda: used() < before + CONTEXT_BYTES)


def becomes(true: Callable[[], bool]) -> bool:
    """Waits until it is so: a driver takes its time."""
    end = time.monotonic() + RETURNED_WITHIN_S
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.05)
    return true()
