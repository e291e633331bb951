"""Whatever a client sends, the worker answers with a refusal or not at all, and goes on serving the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.untrusted.calls import CHECKPOINT, CONFIG, HELLO, answer, arrival, greet
from tests.untrusted.fake_driver import FakeDriver
from tests.untrusted.shm_worker import connected, serving
from tests.wire.links import WAIT_S
from tsqp.untrusted import worker as worker_module
from tsqp.untrusted.backends.base import Backend
from tsqp.untrusted.backends.cpu import CpuBackend
from tsqp.untrusted.backends.cuda import CudaBackend
from tsqp.untrusted.paths import plain
from tsqp.untrusted.store import WeightStore
from tsqp.untrusted.worker import Worker
from tsqp.wire.channel import Frames
from tsqp.wire.codec import decode_reply, encode
from tsqp.wire.messages import (
    PROTOCOL_VERSION,
    AttentionScores,
    AttentionValues,
    Done,
    Embed,
    Failed,
    Hello,
    Linear,
    Message,
    Refused,
)
from tsqp.wire.payload import tensor_bytes
from tsqp.wire.transport import new_ipc_address


@pytest.fixture(params=["cpu", "cuda"])
def worker(request: pytest.FixtureRequest) -> Iterator[Worker]:
    backend = CpuBackend() if request.param == "cpu" else CudaBackend(FakeDriver())
    with torch.inference_mode(), backend.serving():
        yield Worker(WeightStore(CHECKPOINT, "float32", torch.device("cpu"), backend=backend))


X = torch.zeros(2, CONFIG.hidden_size)
GOOD = Linear(7, "qkv", 0, None, 2)
BAD_CALLS: dict[str, tuple[Message, list[torch.Tensor]]] = {
    "a layer that is not there": (Linear(1, "qkv", CONFIG.num_layers, None, 2), [X]),
    "no layer": (Linear(1, "qkv", None, None, 2), [X]),
    "a layer for the head": (Linear(1, "lm_head", 0, None, 2), [X]),
    "a part that is not there": (Linear(1, "qkv", 0, 3, 2), [X]),
    "more rows than sent": (Linear(1, "qkv", 0, None, 3), [X]),
    "fewer rows than sent": (Linear(1, "qkv", 0, None, 1), [X]),
    "no payload": (Linear(1, "qkv", 0, None, 2), []),
    "two payloads": (Linear(1, "qkv", 0, None, 2), [X, X]),
    "a token outside of the vocabulary": (Embed(1, 1), [torch.tensor([CONFIG.vocab_size], dtype=torch.int32)]),
    "a negative token": (Embed(1, 1), [torch.tensor([-1], dtype=torch.int32)]),
    "tokens of another size": (Embed(1, 1), [torch.tensor([1], dtype=torch.int64)]),
    "scores without keys": (AttentionScores(1, 1, 1), [torch.zeros(CONFIG.num_heads, 1, CONFIG.head_dim)]),
    "a mix of other sizes": (AttentionValues(1, 2, 2), [X, X]),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_fails_and_the_next_one_works(worker: Worker, name: str) -> None:
    greet(worker)
    message, payloads = BAD_CALLS[name]
    reply = answer(worker, message, *payloads)
    assert isinstance(reply, Failed)
    assert reply.id == 1
    assert isinstance(answer(worker, GOOD, X), Done)


def test_a_call_before_the_handshake_fails(worker: Worker) -> None:
    reply = answer(worker, GOOD, X)
    assert isinstance(reply, Failed)
    assert "handshake" in reply.reason


@pytest.mark.parametrize("garbage", [b"", b"\xc1", b"\xff" * 100, encode(Done(1)), encode(Failed(1, "x"))])
def test_garbage_gets_no_answer(worker: Worker, garbage: bytes) -> None:
    greet(worker)
    assert worker.answer(arrival(garbage)) is None
    assert isinstance(answer(worker, GOOD, X), Done)


@pytest.mark.parametrize(
    "hello", [Hello(PROTOCOL_VERSION + 1, HELLO.fingerprint, "float32"), Hello(PROTOCOL_VERSION, "0" * 64, "float32")]
)
def test_another_version_or_model_is_refused(worker: Worker, hello: Hello) -> None:
    assert isinstance(greet(worker, hello), Refused)
    assert isinstance(answer(worker, GOOD, X), Failed)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), IndexError()], ids=["a disk", "a fault"])
def test_weights_that_cannot_be_read_are_a_refusal(
    worker: Worker, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the path that one client asks for: those who have another one go on."""

    def prepare(path: str) -> None:
        raise error

    monkeypatch.setattr(worker, "prepare", prepare)
    refused = greet(worker)
    assert isinstance(refused, Refused)
    assert type(error).__name__ in refused.reason
    monkeypatch.undo()
    greet(worker)
    assert isinstance(answer(worker, GOOD, X), Done)


LARGE: dict[str, tuple[Message, list[torch.Tensor]]] = {
    "linear": (GOOD, [X]),
    "embed": (Embed(1, 8), [torch.zeros(8, dtype=torch.int32)]),
    "scores": (
        AttentionScores(1, 8, 8),
        [torch.zeros(CONFIG.num_heads, 8, CONFIG.head_dim), torch.zeros(CONFIG.num_kv_heads, 8, CONFIG.head_dim)],
    ),
    "values": (
        AttentionValues(1, 8, 8),
        [torch.zeros(CONFIG.num_heads, 8, 8), torch.zeros(CONFIG.num_kv_heads, 8, CONFIG.head_dim)],
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_product_that_no_reply_can_carry_is_refused_before_it_is_computed(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    greet(worker)
    message, payloads = LARGE[name]
    with monkeypatch.context() as patch:
        patch.setattr(plain, "MAX_FRAME_BYTES", 500)
        reply = answer(worker, message, *payloads)
    assert isinstance(reply, Failed)
    assert "limit" in reply.reason
    assert isinstance(answer(worker, message, *payloads), Done)


@pytest.mark.parametrize("backend", [CpuBackend, lambda: CudaBackend(FakeDriver())], ids=["cpu", "cuda"])
def test_an_answer_that_the_line_does_not_carry_fails_its_call_alone(backend: Callable[[], Backend]) -> None:
    """Here because the line has a lower limit than the worker knows of."""
    tokens = torch.zeros(8, dtype=torch.int32)
    with serving(backend(), new_ipc_address(), max_frame_bytes=500) as (listener, _), connected(listener) as channel:
        for rows, expected in ((1, Done), (8, Failed), (1, Done)):
            channel.send(Frames(encode(Embed(rows, rows)), (tensor_bytes(tokens[:rows]),)))
            reply = decode_reply(channel.receive(WAIT_S).control)
            assert isinstance(reply, expected)
            assert reply.id == rows


ERRORS = [MemoryError(), RuntimeError("out of memory\nstack"), RuntimeError("x" * 10_000), IndexError(), KeyError("x")]


@pytest.mark.parametrize("error", ERRORS)
def test_a_failure_of_the_product_is_an_answer(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    greet(worker)

    def fail(*_: Any) -> memoryview:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(plain.Operators, "__call__", fail)
        reply = answer(worker, GOOD, X)
    assert isinstance(reply, Failed)
    assert reply.reason
    assert "\n" not in reply.reason
    assert isinstance(answer(worker, GOOD, X), Done)


def test_a_fault_of_the_worker_is_logged_by_its_class_and_place(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And not by its text, which may quote what a client has sent."""
    greet(worker)

    def fail(*_: Any) -> memoryview:
        return [memoryview(b"")][len("what a client has sent")]

    with monkeypatch.context() as patch:
        patch.setattr(plain.Operators, "__call__", fail)
        reply = answer(worker, GOOD, X)
    assert isinstance(reply, Failed)
    assert reply.reason == f"a fault of the worker: IndexError at test_worker.py:{fail.__code__.co_firstlineno + 1}"
    assert reply.reason in caplog.text


def test_the_longest_silent_connection_is_forgotten_first(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "MAX_GREETED", 3)
    greet(worker)
    for number in range(20):
        greet(worker, peer=b"other %d" % number)
        assert isinstance(answer(worker, GOOD, X), Done)  # in use, so it stays
