"""Keeps this process's memory out of core dumps and from other processes of its user, as far as Linux lets it.

Covers: core dumps; ptrace and /proc/PID/mem of processes without privileges (tests/tee/test_hardening.py).
Does not cover: root, the kernel, the host. Assumes: no other code of this process takes it back.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4
YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
MAY_ATTACH = {"1": "its ancestors", "2": "administrators", "3": "nobody"}  # Yama's scopes; 0 restricts nothing


@dataclass(frozen=True)
class Hardening:
    """What holds of this process.

    ``undumpable``: no other process of its user can read its memory. ``no_core``: its core dumps have no size.
    """

    undumpable: bool
    no_core: bool


def harden_process() -> Hardening:
    """Give up core dumps and being attached to, for the rest of this process's life. Never raises: look at the result.

    A process started from here has the core limit too, and is otherwise as any other.
    """
    if sys.platform != "linux":
        return Hardening(undumpable=False, no_core=False)
    # Ends core dumps too, also those that go into a pipe, for which the limit does not count.
    _prctl(PR_SET_DUMPABLE, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # always allowed: it is lowered
    return current_hardening()


def current_hardening() -> Hardening:
    """What holds now."""
    if sys.platform != "linux":
        return Hardening(undumpable=False, no_core=False)
    return Hardening(_prctl(PR_GET_DUMPABLE) == 0, resource.getrlimit(resource.RLIMIT_CORE) == (0, 0))


def hardening_state(yama: Path = YAMA) -> str:
    """One line for ``tsqp doctor``: who can read the memory of this process, and what that says of a worker here."""
    if sys.platform != "linux":
        return "not Linux: nothing is known of who can read this process's memory"
    if current_hardening().undumpable:
        readers = "this process cannot be dumped or attached to, except by root"
    else:
        readers = f"this process can be dumped, and attached to by {_may_attach(yama)}; private modes allow root alone"
    same = f"a worker started here has the same user id ({os.getuid()}): a demonstration, not isolation"
    return f"{readers}; {same}"


def _may_attach(yama: Path) -> str:
    """Whom the Yama security module lets attach to a process of the same user."""
    try:
        scope = yama.read_text().strip()
    except OSError:
        return "every process of its user (no Yama)"
    return f"{MAY_ATTACH.get(scope, 'every process of its user')} (Yama ptrace_scope {scope})"


def _prctl(option: int, value: int = 0) -> int:
    return int(ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3))
