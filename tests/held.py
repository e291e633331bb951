"""A model whose passes wait, so that what a test needs to be under way is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from tests.commands import LIMIT_S
from tsqp import AsyncLLM


@contextmanager
def held(model: AsyncLLM) -> Iterator[None]:
    """No pass ends meanwhile."""
    gate, decoder = threading.Event(), cast(Any, model.llm.engine.decoder)
    forward = decoder.forward

    def waits(batch: Any) -> Any:
        assert gate.wait(LIMIT_S)
        return forward(batch)

    decoder.forward = waits
    try:
        yield
    finally:
        gate.set()
        decoder.forward = forward
