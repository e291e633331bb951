"""Where the time and the bytes of a run go: one row per kind of remote call, one per trusted operator."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

from tsqp.model.meter import CALL_KINDS, OPERATOR_KINDS, CallKind, OperatorKind
from tsqp.trusted.trace import Trace, Track


@dataclass
class CallStats:
    """Calls of one kind. Times in seconds; ``rpc_s`` runs from sending a call to holding its reply.

    Calls in flight together are each counted in full there; ``held_s`` is the time that this side spent on them and
    could do nothing else. ``worker_s`` is what the worker says it computed for: shown, and used for nothing else.

    Of a product that is computed here nothing is sent: ``held_s`` is the time of the product itself, the rest stays 0.
    """

    count: int = 0
    rpc_s: float = 0.0
    serialise_s: float = 0.0
    deserialise_s: float = 0.0
    worker_s: float = 0.0
    held_s: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0


def total(calls: Iterable[CallStats]) -> CallStats:
    """The sum of several rows."""
    rows = [astuple(call) for call in calls]
    return CallStats(*(sum(column) for column in zip(*rows, strict=True)))


class Stretch:
    """A context whose time is counted unless it raises. (One made of a generator costs twice as much.)"""

    def __init__(self, count: Callable[[Any, float, float], None], kind: object) -> None:
        self._count, self._kind = count, kind

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self._count(self._kind, self._start, time.perf_counter())


@dataclass
class Stats:
    """Counters of one engine since it started; ``reset`` begins again. ``trace`` records every step when set."""

    calls: dict[CallKind, CallStats] = field(default_factory=lambda: {kind: CallStats() for kind in CALL_KINDS})
    operator_s: dict[OperatorKind, float] = field(default_factory=lambda: dict.fromkeys(OPERATOR_KINDS, 0.0))
    forward_passes: int = 0
    chunks: int = 0
    micro_batches: int = 1
    hedged: int = 0  # slices of calls that were asked of one more worker because they took long
    prefill_s: float = 0.0
    decode_s: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0
    decode_tokens: int = 0
    trace: Trace | None = field(default=None, repr=False)
    guard: Callable[[], dict[str, object]] | None = field(default=None, repr=False)  # figures of a private mode
    heard_s: float = field(default=0.0, repr=False)  # by time.perf_counter: the worker's last sign of life

    def passed(self, start_s: float, end_s: float, rows: list[int], *, prefill: bool) -> None:
        """Count one forward pass over so many new tokens of each sequence."""
        self.traced("pass", "prefill" if prefill else "decode", start_s, end_s)
        self.heard_s = end_s
        if prefill:
            self.prefill_s += end_s - start_s
            self.prompt_tokens += sum(rows)
        else:
            self.decode_s += end_s - start_s
            self.decode_tokens += sum(rows)

    def operator(self, kind: OperatorKind) -> Stretch:
        """Count the time of a trusted operator."""
        return Stretch(self.spent, kind)

    def spent(self, kind: OperatorKind, start_s: float, end_s: float) -> None:
        """Count one stretch of time of a trusted operator."""
        self.operator_s[kind] = self.operator_s.get(kind, 0.0) + end_s - start_s
        if self.trace is not None:
            self.traced("operator", kind, start_s, end_s)

    def product(self, kind: CallKind) -> Stretch:
        """Count the time of a product computed on the trusted side: no call, so only its time."""
        return Stretch(self._multiplied, kind)

    def _multiplied(self, kind: Any, start_s: float, end_s: float) -> None:
        self.calls[kind].held_s += end_s - start_s
        self.traced("operator", kind, start_s, end_s)

    def traced(self, track: Track, name: str, start_s: float, end_s: float, **details: Any) -> None:
        """Record one span where a trace is wanted."""
        if self.trace is not None:
            self.trace.add(track, name, start_s, end_s, **details)

    @property
    def rpc_calls(self) -> int:
        return total(self.calls.values()).count

    @property
    def other_s(self) -> float:
        """Time of the forward passes that no row accounts for: residuals, the cache, sampling, Python."""
        known = total(self.calls.values()).held_s + sum(self.operator_s.values())
        return max(0.0, self.prefill_s + self.decode_s - known)

    def as_dict(self) -> dict[str, object]:
        """The ``stats`` object of ``--json``. ``tokens_per_s`` is of decode, 0 when nothing was decoded."""
        calls = total(self.calls.values())
        speed = self.decode_tokens / self.decode_s if self.decode_s else 0.0
        return {
            "rpc_calls": calls.count,
            "bytes_sent": calls.bytes_sent,
            "bytes_received": calls.bytes_received,
            "prefill_s": self.prefill_s,
            "decode_s": self.decode_s,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "tokens_per_s": speed,
            "forward_passes": self.forward_passes,
            "chunks": self.chunks,
            "micro_batches": self.micro_batches,
            "hedged": self.hedged,
            **self._guarded(speed),
            "calls": {str(kind): asdict(call) for kind, call in self.calls.items()},
            "operators_s": {**{str(kind): s for kind, s in self.operator_s.items()}, "other": self.other_s},
        }

    def _guarded(self, speed: float) -> dict[str, object]:
        """The figures of a private mode. ``pads_drained_s``: how long ready pads last at ``speed``; None at speed 0."""
        figures = {} if self.guard is None else self.guard()
        ready = figures.get("pads_ready")
        if isinstance(ready, int):
            figures["pads_drained_s"] = ready / speed if speed else None
        return figures

    def reset(self) -> None:
        """Begin again at zero; a trace goes on, and so do the figures of a guard."""
        vars(self).update(vars(Stats(trace=self.trace, guard=self.guard)))
