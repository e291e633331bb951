"""How the workers of a model are, for a report, a metrics page or a readiness probe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class WorkerState:
    """``state``: ``ready``; ``reconnecting``, requests wait; or ``failed``, they end with ``error``.

    ``since_s``: how long it has been so, in seconds. ``address``: of the worker in use or the last one; ``losses``: of
    sessions; ``reconnects``: sessions after the first; ``pauses``, ``paused_s``: how often, and for how
    many seconds in all, a worker was waited for; ``failed_checks``: by workers and dealers. ``expelled``: the names of
    those that nothing is asked of any more, with what they did. ``cheated``: whether there is no worker because the
    last one cheated, or a dealer; a worker that is lost after another has cheated is lost.
    """

    state: Literal["ready", "reconnecting", "failed"]
    since_s: float
    address: str
    losses: int
    reconnects: int
    pauses: int
    paused_s: float
    failed_checks: int
    expelled: dict[str, str]
    error: str | None
    cheated: bool
