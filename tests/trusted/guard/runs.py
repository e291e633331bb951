"""Masked runs whose messages are copied, and workers that can go away."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from tests.conftest import fresh_address
from tsqp import LLM, SamplingParams, WorkerConfig
from tsqp.api.config import GuardConfig
from tsqp.audit.capture import Capture
from tsqp.checkpoint import open_checkpoint
from tsqp.untrusted.store import WeightStore
from tsqp.untrusted.worker import Worker
from tsqp.wire.messages import Product
from tsqp.wire.transport import listen

Array = np.ndarray[Any, np.dtype[Any]]

MODEL = "synthetic:tiny"
PROMPT = list(range(3, 43))  # 40 tokens: three blocks of pads, the last in part
FEW = SamplingParams(max_tokens=4, ignore_eos=True)


def open_llm(worker: str | WorkerConfig, capture: Capture, connect: Any = None) -> LLM:
    """A masked run whose messages are copied. Pads are made when they are needed, so that every path is taken."""
    options = GuardConfig(pads_ahead=0)
    return LLM(MODEL, protection="masked", worker=worker, guard=options, connect=connect or capture.connect)


def sent_rows(*captures: Capture) -> list[Array]:
    """The payloads of products, uint32 (R, K), as they were when they were sent."""
    rows = []
    for seen in (seen for capture in captures for seen in capture.messages):
        if isinstance(seen.message, Product):
            assert seen.message.digits == 4
            assert seen.payloads is not None
            (payload,) = seen.payloads
            rows.append(np.frombuffer(payload, np.uint32).reshape(seen.message.rows, -1))
    return rows


@contextmanager
def worker_that_can_go() -> Iterator[tuple[str, Callable[[], None]]]:
    """A worker's address, and what ends it."""
    store = WeightStore(open_checkpoint(MODEL), "float32", torch.device("cpu"))
    listener = listen(fresh_address("mem"))
    thread = threading.Thread(target=Worker(store).serve, args=(listener,), daemon=True)
    thread.start()

    def go() -> None:
        listener.interrupt()
        thread.join()
        listener.close()

    try:
        yield listener.address, go
    finally:
        go()
