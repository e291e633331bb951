"""What an engine has done and holds, in numbers for a report or a metrics page."""

from __future__ import annotations

from dataclasses import dataclass, field

from tsqp.trusted.engine.request import FinishReason


@dataclass
class Counts:
    """``added`` = ``waiting`` + ``running`` + all that ended, at every moment.

    ``refused`` requests were never added. ``found_tokens``: prompt tokens that were in a kept cache, or in that of
    another request with the same prompt; ``prompt_tokens``: rows that were computed up to the end of a prompt, again
    after each preemption. ``kv_bytes`` are those charged to running requests, ``kept_bytes`` those of kept caches;
    ``kv_limit``: the most for both together, None for no bound.
    """

    added: int = 0
    refused: int = 0
    waiting: int = 0
    running: int = 0
    ended: dict[FinishReason, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "abort": 0, "error": 0})
    preemptions: int = 0
    prompt_tokens: int = 0
    found_tokens: int = 0
    new_tokens: int = 0
    kv_bytes: int = 0
    kept_bytes: int = 0
    kv_limit: int | None = None
