"""How much an engine takes on at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of the engine; memory for keys and values is ``compute.kv_memory``.

    ``running``: requests that have a cache at once. ``waiting``: requests in the queue; None for no bound.
    ``prefill_rows``: prompt tokens of a step in which answers go on as well, so that a long prompt does not hold them
    up; on a fast device more of them cost running answers little. ``idle_rows``: prompt tokens after which a step
    without answers takes no further prompt. Each is at least 1.
    """

    running: int = 64
    waiting: int | None = None
    prefill_rows: int = 32
    idle_rows: int = 2048
