"""Nodes of a cluster of this machine: which processes are one, and how one is lost."""

from __future__ import annotations

import fcntl
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tsqp.cluster.processes import processes_of
from tsqp.cluster.state import ClusterDirectory


def processes(directory: ClusterDirectory) -> list[int]:
    """All of a cluster that is there."""
    return processes_of(directory.path, directory.ray_path(directory.read()))


def command_of(pid: int) -> list[str]:
    """Its command line; nothing for a process that is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    return []


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def raylets(directory: ClusterDirectory) -> dict[str, int]:
    """The process that is a node to Ray, by the first twelve digits of the node's id; the head is among them."""
    found = {}
    for pid in processes(directory):
        words = command_of(pid)
        if words and words[0].endswith("/raylet"):
            (node,) = (word.partition("=")[2] for word in words if word.startswith("--node_id="))
            found[node[:12]] = pid
    return found


def lose(raylet: int, workers: list[int]) -> None:
    """What happens when a machine is switched off: its processes end, and none of them says so."""
    for pid in (raylet, *(parent_of(worker) for worker in workers), *workers):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def listening(pids: list[int]) -> dict[str, str]:
    """The sockets at which these processes take TCP connections, with the addresses in the kernel's notation."""
    theirs = set()
    for pid in pids:
        with suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):  # closed meanwhile
                    theirs.add(str(link.readlink()))
    return {socket: address for socket, address in all_listening().items() if socket in theirs}


def all_listening() -> dict[str, str]:
    """The same of all processes. A port may be another's by now; the number of a socket is not used again so soon."""
    tables = (Path(f"/proc/net/{table}").read_text().splitlines()[1:] for table in ("tcp", "tcp6"))
    lines = (line.split() for table in tables for line in table)
    return {f"socket:[{words[9]}]": words[1].rpartition(":")[0] for words in lines if words[3] == "0A"}


def shared_memory(pids: list[int]) -> set[Path]:
    """Files of shared memory that these processes have mapped, also those whose names are gone by now."""
    found = set()
    for pid in pids:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                _, _, name = line.partition(" /dev/shm/")
                if name:
                    found.add(Path("/dev/shm") / name.removesuffix(" (deleted)"))
    return found


@contextmanager
def alone_on_this_machine() -> Iterator[None]:
    """Other test processes wait: each would start a cluster of its own where pytest-xdist divides a module."""
    with (Path(tempfile.gettempdir()) / f"tsqp-test-cluster-{os.geteuid()}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
