"""What a server says of itself when it answers."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tsqp.api.llm import LLM


class Ready(NamedTuple):
    """What a server says of itself when it answers."""

    address: str
    metrics_address: str | None
    model: str
    protection: str
    ready_s: float  # since the process was started


def fingerprint_of(llm: LLM) -> str:
    """The mode, the weights and the adapters, for ``system_fingerprint``: equal for answers that were computed alike.

    Which adapter has answered is in the model's name.
    """
    if llm.guard is not None:
        digest = llm.guard.model_digest
    elif llm.session is not None:
        digest = llm.run_digest(llm.session.welcome.fingerprint)
    else:
        digest = llm.run_digest(hashlib.sha256(repr(llm.config).encode()).hexdigest())
    return f"tsqp-{llm.plan.protection.name}-{digest[:16]}"


def url(host: str, port: int, *, tls: bool = False) -> str:
    """``http://host:port``; an address of IPv6 is in brackets."""
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def since_start_s() -> float:
    """Seconds since this process was started, by what the system says of it."""
    fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
