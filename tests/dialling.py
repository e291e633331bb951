"""A ``connect`` for ``LLM`` that puts something in front of the channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tsqp.wire.channel import Channel
from tsqp.wire.transport import connect


def dialling(wrap: Callable[[Channel], Any]) -> Callable[..., Any]:
    """Connects as the default does, and wraps what comes of that."""

    def dial(address: str, **options: Any) -> Any:
        return wrap(connect(address, **options))

    return dial
