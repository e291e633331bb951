"""How much an engine takes on at once."""

from __future__ import annotations

from dataclasses import dataclass

from tsqp.errors import OptionError


@dataclass(frozen=True)
class Limits:
    """Bounds of the engine; memory for keys and values is ``compute.kv_memory``. Raises OptionError.

    ``running``: requests that have a cache at once. ``waiting``: requests in the queue; None for no bound.
    ``slowdown``: how many times as long as a step of answers alone one may last that has prompt tokens as well, so
    that a long prompt does not hold running answers up. ``prefill_rows``: a fixed number of prompt tokens in such a
    step, in place of as many as ``slowdown`` allows. ``idle_rows``: prompt tokens after which a step without answers
    that somebody follows takes no further prompt; one that is not done with in twice as many is cut there. Numbers of
    requests and of tokens are at least 1.
    """

    running: int = 64
    waiting: int | None = None
    prefill_rows: int | None = None
    idle_rows: int = 2048
    slowdown: float = 2.0

    def __post_init__(self) -> None:
        if not 1 < self.slowdown < float("inf"):
            raise OptionError(f"limits: slowdown is a number above 1, not {self.slowdown}")
        for name in ("running", "waiting", "prefill_rows", "idle_rows"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise OptionError(f"limits: {name} is at least 1, not {number}")
