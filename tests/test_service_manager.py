"""systemd is told that a process is ready and that it ends; nothing else of this side is told, and nothing waits."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import LIMIT_S, Home
from tests.families import tiny_model
from tests.server.process import serving
from tsqp.launch.local import PASSED_ON
from tsqp.service_manager import READY, STOPPING, VARIABLE, notify

MODEL = ("--model", tiny_model("llama").directory)


@pytest.fixture
def manager(home: Home) -> Iterator[socket.socket]:
    """Its socket, which commands of ``home`` know of."""
    path = home.runtime / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.bind(str(path))
        line.settimeout(LIMIT_S)
        home.environment[VARIABLE] = str(path)
        yield line


def told(manager: socket.socket) -> list[str]:
    return manager.recv(4096).decode().split("\n")


def test_nothing_is_told_without_a_manager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.bind("relative")
        line.setblocking(False)
        for value in ("", "relative", str(tmp_path / "nobody"), "@nobody-tsqp-test", "/" + "x" * 300, None):
            if value is None:
                monkeypatch.delenv(VARIABLE)
            else:
                monkeypatch.setenv(VARIABLE, value)
            notify(READY)
        with pytest.raises(BlockingIOError):
            line.recv(4096)
    assert [path.name for path in tmp_path.iterdir()] == ["relative"]


def test_a_manager_that_reads_nothing_holds_nobody_up(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.bind(path := str(home.runtime / "full"))
        monkeypatch.setenv(VARIABLE, path)
        for _ in range(1000):
            notify("STATUS=" + "x" * 1000)


def test_a_name_without_a_file_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.bind("")  # Linux gives one
        name = line.getsockname()
        monkeypatch.setenv(VARIABLE, "@" + name[1:].decode())
        line.settimeout(LIMIT_S)
        notify(READY, "STATUS=here")
        assert told(line) == [READY, "STATUS=here"]


def test_a_server_says_when_it_is_ready_and_when_it_ends(home: Home, manager: socket.socket) -> None:
    options = (*MODEL, "--protection", "open", "--dtype", "float32", "--port", 0)
    with serving(home, *options) as server:
        assert told(manager) == [READY, "STATUS=answering, protection open"]
        server.process.send_signal(signal.SIGTERM)
        assert told(manager)[0] == STOPPING
        assert server.ended() == 0
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):  # the worker that it has started is none of the manager's
        told(manager)
    assert VARIABLE not in PASSED_ON


def test_a_worker_says_when_it_listens_and_when_it_ends(home: Home, manager: socket.socket) -> None:
    with home.worker(*MODEL) as (process, address):
        assert told(manager) == [READY, f"STATUS=listening on {address}"]
        process.send_signal(signal.SIGTERM)
        assert told(manager) == [STOPPING]
        assert process.wait(LIMIT_S) == 0
