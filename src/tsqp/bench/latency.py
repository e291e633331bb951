"""Figures of many answers: how fast tokens came in all, and how long single ones were waited for.

Every latency is counted from the moment at which an answer was meant to be asked for. A request that was sent late,
because the client or the server was held up, has waited since then: leaving that out would hide the worst waits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from tsqp.errors import WorkerFailed

REFUSED = (429, 503)  # too many requests; too few pads
SERVED = 200


class Answer(NamedTuple):
    """One answer that a client has read. Times in seconds, of one clock.

    ``asked_s``: when it was meant to be asked for. ``arrived_s``: of each event that had something of it. ``tokens``:
    as many as the server says it has; an event may have the text of several. Refused ones have neither.
    """

    asked_s: float
    status: int = SERVED
    arrived_s: tuple[float, ...] = ()
    tokens: int = 0

    @property
    def first_s(self) -> float:
        """Until its first token."""
        return self.arrived_s[0] - self.asked_s

    @property
    def whole_s(self) -> float:
        """Until its end."""
        return self.arrived_s[-1] - self.asked_s

    @property
    def token_s(self) -> float:
        """For each token after the first one."""
        return (self.arrived_s[-1] - self.arrived_s[0]) / max(1, self.tokens - 1)


def percentile(values: Sequence[float], share: float) -> float:
    """The least of the values that a ``share`` of them does not exceed, 0 < share ≤ 1."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def tokens_between(answers: Sequence[Answer], start_s: float, end_s: float) -> float:
    """Tokens that came after ``start_s`` and up to ``end_s``; those of one answer are spread evenly over its events."""
    return sum(
        answer.tokens * sum(start_s < when <= end_s for when in answer.arrived_s) / len(answer.arrived_s)
        for answer in answers
        if answer.arrived_s
    )


def rate_together(answers: Sequence[Answer]) -> float:
    """Tokens a second of all answers together, from the last first token to the first end: while all of them go on.

    Raises WorkerFailed where they never do.
    """
    start_s = max(answer.arrived_s[0] for answer in answers)
    end_s = min(answer.arrived_s[-1] for answer in answers)
    if end_s <= start_s:
        raise WorkerFailed("an answer had ended before another one began, so they have no rate: give more --steps")
    return tokens_between(answers, start_s, end_s) / (end_s - start_s)


def figures(answers: Sequence[Answer], start_s: float, end_s: float) -> dict[str, Any]:
    """Tokens a second in this time, and the latencies of all answers: medians, and what 95 of 100 do not exceed.

    Latencies are None where no answer was given.
    """
    served = [answer for answer in answers if answer.arrived_s]
    return {
        "answers": len(served),
        "refused": len(answers) - len(served),
        "seconds": end_s - start_s,
        "tokens_per_s": tokens_between(served, start_s, end_s) / (end_s - start_s),
        "first": _spread([answer.first_s for answer in served]),
        "token": _spread([answer.token_s for answer in served]),
        "whole": _spread([answer.whole_s for answer in served]),
    }


def _spread(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    return {"p50_s": percentile(seconds, 0.5), "p95_s": percentile(seconds, 0.95)}
