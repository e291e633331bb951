"""How workers are, as a supervisor would say."""

from __future__ import annotations

from typing import Literal

from tsqp.api.worker_state import WorkerState


def worker_state(
    state: Literal["ready", "reconnecting", "failed"],
    *,
    losses: int = 0,
    reconnects: int = 0,
    pauses: int = 0,
    paused_s: float = 0.0,
    failed_checks: int = 0,
    expelled: dict[str, str] | None = None,
    cheated: bool = False,
) -> WorkerState:
    """A state with these figures."""
    expelled = expelled or {}
    counted = (losses, reconnects, pauses, paused_s, failed_checks)
    return WorkerState(state, 0.0, "shm:///x", *counted, expelled, None, cheated)
