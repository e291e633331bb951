"""Processes of a cluster are known by its mark or by its files, never by a name, and all of them are ended."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.commands import wait_gone
from tsqp.cluster import processes
from tsqp.cluster.processes import MARK, end_processes, processes_of

STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
WAIT = "print(flush=True); import sys; sys.stdin.read()"


@contextmanager
def running(code: str, *, mark: Path | None = None, file: Path | None = None) -> Iterator[int]:
    """A process that has said that it runs."""
    environment = dict(os.environ) | ({} if mark is None else {MARK: str(mark)})
    with ExitStack() as stack:
        error = subprocess.DEVNULL if file is None else stack.enter_context(file.open("wb"))
        pipe = subprocess.PIPE
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdin=pipe, stdout=pipe, stderr=error)
        stack.enter_context(process)
        stack.callback(process.kill)
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield process.pid


def test_all_of_a_cluster_end_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PATIENCE_S", 1.0)
    ours, other = tmp_path / "ray", tmp_path / "ray2"  # whose name begins with ours
    for directory in (ours, other):
        directory.mkdir()
    a, b = (tmp_path / "clusters" / name for name in ("a", "a2"))
    with (
        running(WAIT, mark=a) as polite,
        running(STUBBORN + WAIT, mark=a) as stubborn,
        running(WAIT, file=ours / "log") as titled,
        running(WAIT, mark=b) as marked,
        running(WAIT, file=other / "log") as writing,
        running(WAIT) as stranger,
    ):
        assert set(processes_of(a, ours)) == {polite, stubborn, titled}
        end_processes(a, ours)
        assert processes_of(a, ours) == []
        for pid in (polite, stubborn, titled):
            wait_gone(pid)
        assert set(processes_of(b, other)) == {marked, writing}
        os.kill(stranger, 0)


def test_this_process_is_never_among_them(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb"):
        assert processes_of(tmp_path / "a", tmp_path) == []
