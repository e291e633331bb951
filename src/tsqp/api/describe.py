"""What a run says of itself, in lines of plain text: its mode before it starts, what the handshake has shown after."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tsqp.api.config import GuardConfig, is_roster
from tsqp.config.model import ModelConfig

if TYPE_CHECKING:
    from tsqp.api.llm import LLM
    from tsqp.api.plan import Plan

WARNING, PLAIN = "yellow", "dim"  # the styles of lines


def mode_lines(plan: Plan) -> Iterator[tuple[str, str]]:
    """What the worker may learn, and its style; one more line over cuda, and where a dealer could collude."""
    protection, guard = plan.protection, plan.run.guard
    line = f"protection {protection.name}: the worker sees {protection.worker_sees}"
    warn = protection.uses_worker and not protection.checked
    yield (f"warning: {line}", WARNING) if warn else (line, PLAIN)
    if any(address.startswith("cuda://") for address in plan.run.worker.addresses):
        yield "warning: no isolation: over cuda:// the worker can read and write this side's arena at any time", WARNING
    if guard.dealer is not None and guard.dealer_no_separation:
        line = f"no separation: whoever runs the worker may read the line to the dealer {guard.dealer}"
        yield f"warning: {line}", WARNING


def adapter_lines(llm: LLM) -> Iterator[str]:
    """Each adapter that requests may have, and its SHA-256."""
    for name, digest in llm.adapters.items():
        yield f"adapter {name}: sha256 {digest}"


def handshake_line(llm: LLM) -> str | None:
    """The device, the transport and the address in use, checks and pads; None where there is no worker."""
    plan, session = llm.plan, llm.session
    if session is None or plan.partition is None:
        return None
    return (
        f"partition {plan.partition.name}, {plan.dtype}, wire {plan.crossing}; worker on {session.welcome.device} in "
        f"{session.welcome.dtype} over {session.transport}, {session.address}{_of_the_guard(llm)}"
    )


def _of_the_guard(llm: LLM) -> str:
    """What a private mode adds to the line."""
    if llm.guard is None or llm.session is None:
        return ""
    found = llm.guard.report()
    checks = f"; a wrong product passes with probability 2^-{found['soundness_bits']:.0f}"
    if llm.guard.filler is None:
        return checks
    source = "this process"
    if llm.dealer is not None:
        source = f"the dealer{'s of' if is_roster(str(llm.dealer.address)) else ''} {llm.dealer.address}"
    ahead = ahead_text(llm.session.config, llm.plan.run.guard, llm.guard.filler.ahead)
    return f"{checks}; pads by {source} for {ahead}"


def ahead_text(config: ModelConfig, guard: GuardConfig, ahead: int) -> str:
    """Tokens whose pads are kept ready; where memory allows fewer than were asked for, that too."""
    if ahead >= guard.pads_ahead:
        return f"{ahead} tokens ahead"
    from tsqp.api.pads import pool_bytes

    needed = pool_bytes(config, guard.pads_ahead, whole_answers=guard.pads_empty == "refuse")
    return f"{ahead} of {guard.pads_ahead} tokens ahead: pads may take {guard.pad_memory} bytes of {needed}"
