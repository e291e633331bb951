"""A worker on the GPU: the same integers as on the CPU, by the fast ways, and alive after it ran out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
import torch

from tests.untrusted.calls import CHECKPOINT, CONFIG, HELLO, PEER, answer, arrival, greet
from tsqp import LLM, ComputeConfig, SamplingParams, WorkerConfig
from tsqp.arith.field import MAX_SMALL
from tsqp.arith.modulus import P
from tsqp.config.dtype import DtypeName, NumericPath
from tsqp.config.groups import GroupKey, linear_groups
from tsqp.config.protection import ProtectionName
from tsqp.launch.local import LocalWorker
from tsqp.untrusted.store import WeightStore
from tsqp.untrusted.worker import Worker
from tsqp.wire.channel import Frames
from tsqp.wire.codec import decode_handshake, decode_reply, encode
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
from tsqp.wire.transport import connect

MODEL = "synthetic:tiny"
PROMPT = [5, 17, 250, 3, 99, 42, 7, 8, 9, 1, 2, 30, 31, 32, 33, 34, 35, 36, 37]
FIELD = Hello(PROTOCOL_VERSION, HELLO.fingerprint, "float32", "field")
WAIT_S = 60.0
KEYS: list[GroupKey] = [("qkv", 0), ("o", 0), ("gate_up", 1), ("down", 1), ("lm_head", None)]


@contextmanager
def worker_on(device: torch.device) -> Iterator[Worker]:
    """A worker past a handshake, in what ``Worker.serve`` has around all calls."""
    store = WeightStore(CHECKPOINT, "float32", device)
    worker = Worker(store)
    with torch.inference_mode(), store.backend.serving():
        assert isinstance(greet(worker, FIELD), Welcome)
        yield worker


def product(worker: Worker, message: Message, payload: torch.Tensor) -> bytes:
    frames = worker.answer(arrival(message, payload))
    assert frames is not None
    return bytes(frames.tensors[0])


def test_products_are_those_of_a_worker_on_the_cpu(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    with worker_on(torch.device("cpu")) as here, worker_on(device) as there:
        for key in KEYS:
            for rows in (1, 16, 70):
                shape = (rows, linear_groups(CONFIG)[key[0]].in_features)
                x = torch.randint(0, P, shape, generator=generator).to(torch.int32)
                small = torch.randint(-MAX_SMALL, MAX_SMALL + 1, shape, generator=generator).to(torch.int16)
                for call, payload in ((Product(1, *key, rows, 4), x), (Product(1, *key, rows, 2), small)):
                    assert product(there, call, payload) == product(here, call, payload)
            keys = torch.randint(0, 256, (3, 32), dtype=torch.uint8, generator=generator)
            assert product(there, MultiplyPads(1, *key, 3), keys) == product(here, MultiplyPads(1, *key, 3), keys)


def test_a_worker_over_shm_locks_memory_and_captures_products(device: torch.device) -> None:
    """What it does without is slower and else the same, so that only its own words tell of it."""
    group = linear_groups(CONFIG)["qkv"]
    with LocalWorker(MODEL, device=str(device), dtype="field", threads=2) as worker:
        with closing(connect(worker.wait_ready(), arena_bytes=128 << 20)) as channel:
            channel.send(Frames(encode(FIELD)))
            assert isinstance(decode_handshake(channel.receive(WAIT_S).control), Welcome)
            taken = channel.slot((64 << 20) - (1 << 20), 8)  # so that a later one crosses windows of locked memory
            for rows in (3, 70, 4_096):  # a graph, and launched products
                slot = channel.slot(rows * group.in_features * 4, rows * group.out_features * 4)
                slot.tensor[:] = bytes(len(slot.tensor))
                for number in range(3):
                    channel.send_from(slot, encode(Product(number, "qkv", 0, rows, 4)))
                    assert isinstance(decode_reply(channel.receive(WAIT_S).control), Done)
            del taken
        worker.close()
        complaints = [line for line in worker._errors if "not used" in line or "not locked" in line]
    assert not complaints


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


@pytest.mark.parametrize(("dtype", "path"), [("float32", "float"), ("bfloat16", "float"), ("bfloat16", "int8")])
def test_decode_steps_are_captured_and_wait_for_nothing(
    dtype: DtypeName, path: NumericPath, device: torch.device
) -> None:
    """Over torch's own driver: no operator of a pass but the last copy makes the host wait."""
    store = WeightStore(CHECKPOINT, dtype, device)
    worker = Worker(store)
    tokens = torch.arange(30, dtype=torch.int32)
    with torch.inference_mode(), store.backend.serving():
        assert isinstance(greet(worker, Hello(PROTOCOL_VERSION, HELLO.fingerprint, dtype, path)), Welcome)
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
    shape = (4, linear_groups(CONFIG)["qkv"].in_features)
    call, x = Product(1, "qkv", 0, 4, 4), torch.zeros(shape, dtype=torch.int32)
    with worker_on(device) as worker:
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
