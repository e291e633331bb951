"""Which processes of this machine belong to a cluster: they have its mark, or files of its Ray open.

A process keeps the environment that it was started with, and hands it on; but Ray's workers overwrite theirs with a
title. Those write their log below Ray's directory. No process is ended by its name, so another Ray of the machine, or
another cluster, is left alone.
"""

from __future__ import annotations

import os
import select
import signal
from contextlib import ExitStack, suppress
from pathlib import Path

from tsqp.errors import ClusterError

MARK = "TSQP_CLUSTER"  # the variable with the cluster's directory
PATIENCE_S = 5.0


def processes_of(directory: Path, ray_path: Path) -> list[int]:
    """Process ids of the cluster that has this directory, and whose Ray has that one, but for this process."""
    others = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())
    return [pid for pid in others if pid != os.getpid() and _belongs(pid, directory, ray_path)]


def end_processes(directory: Path, ray_path: Path) -> None:
    """End them: politely, then not. Raises ClusterError where one stays."""
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        _signal(directory, ray_path, number)
        left = processes_of(directory, ray_path)
        if not left:
            return
    raise ClusterError(f"processes {', '.join(map(str, left))} of {directory} do not end")


def _signal(directory: Path, ray_path: Path, number: signal.Signals) -> None:
    """Signal all, and wait until they have ended, for a while."""
    with ExitStack() as stack:
        waiting = select.poll()
        count = 0
        for pid in processes_of(directory, ray_path):
            with suppress(ProcessLookupError):
                fd = os.pidfd_open(pid)
                stack.callback(os.close, fd)
                if _belongs(pid, directory, ray_path):  # whose number it is now cannot change
                    signal.pidfd_send_signal(fd, number)
                    waiting.register(fd, select.POLLIN)
                    count += 1
        deadline = _now_s() + PATIENCE_S
        while count and (left := deadline - _now_s()) > 0:
            for fd, _ in waiting.poll(left * 1000):
                waiting.unregister(fd)
                count -= 1


def _belongs(pid: int, directory: Path, ray_path: Path) -> bool:
    """Whether a process has the mark, or a file below Ray's directory open. A zombie has neither."""
    process, below = Path(f"/proc/{pid}"), os.fsencode(ray_path) + b"/"
    try:
        if os.fsencode(f"{MARK}={directory}") in (process / "environ").read_bytes().split(b"\0"):
            return True
        return any(_points_below(fd, below) for fd in (process / "fd").iterdir())
    except OSError:  # it is gone, or somebody else's
        return False


def _points_below(link: Path, directory: bytes) -> bool:
    with suppress(OSError):
        return os.fsencode(link.readlink()).startswith(directory)
    return False


def _now_s() -> float:
    return os.times().elapsed
