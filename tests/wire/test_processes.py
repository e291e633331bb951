"""Workers in processes of their own, and what is left when they end: well, or by SIGKILL."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.wire.links import WAIT_S
from tsqp.errors import AddressInUse, WorkerLost, WorkerUnreachable
from tsqp.wire.channel import Frames
from tsqp.wire.transport import connect, listen

StartProcess = Callable[..., "subprocess.Popen[str]"]

WORKER = Path(__file__).with_name("worker_process.py")
NEVER_S = 1e4  # a deadline that the test's own time limit does not let pass


@pytest.fixture
def start() -> Iterator[StartProcess]:
    """Starts worker processes; whatever still runs is killed with the test."""
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(WORKER), *arguments]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        with process:  # closes its pipes and waits
            pass


def said(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line that a process prints."""
    assert process.stdout is not None
    line: dict[str, Any] = json.loads(process.stdout.readline())
    return line


@pytest.fixture(params=["ipc", "shm", "tcp"])
def address(request: pytest.FixtureRequest, private_dir: Path) -> str:
    return "tcp://127.0.0.1:0" if request.param == "tcp" else f"{request.param}://{private_dir}/worker.sock"


def test_a_killed_worker_is_noticed_at_once(start: StartProcess, address: str) -> None:
    worker = start(address)
    with closing(connect(said(worker)["address"])) as channel:
        channel.send(Frames(b"hello"))
        assert channel.receive(WAIT_S).control == b"hello"
        channel.send(Frames(b"silence"))
        assert said(worker) == {"busy": True}
        worker.kill()
        with pytest.raises(WorkerLost, match=channel.address):
            channel.receive(NEVER_S)  # typically 1 ms


def test_sending_to_a_killed_worker_fails_too(start: StartProcess, address: str) -> None:
    worker = start(address)
    with closing(connect(said(worker)["address"])) as channel:
        worker.kill()
        worker.wait()

        def send_until_noticed() -> None:
            # The kernel closes the connection with the process; ZeroMQ's thread may learn of it a moment later.
            until = time.monotonic() + WAIT_S
            while time.monotonic() < until:
                channel.send(Frames(b"into the void"))

        with pytest.raises(WorkerLost):
            send_until_noticed()


def test_a_killed_worker_blocks_no_successor(start: StartProcess, private_dir: Path) -> None:
    path = private_dir / "worker.sock"
    worker = start(str(path))
    assert said(worker) == {"address": f"ipc://{path}"}
    with pytest.raises(AddressInUse, match=str(path)):
        listen(str(path))
    worker.kill()
    worker.wait()
    assert path.exists()
    with pytest.raises(WorkerUnreachable):
        connect(str(path))
    with closing(listen(str(path))), closing(connect(str(path))):
        pass
    assert list(private_dir.iterdir()) == []


def test_of_many_that_start_at_once_one_gets_the_address(start: StartProcess, private_dir: Path) -> None:
    workers = [start(f"{private_dir}/worker.sock") for _ in range(4)]
    answers = [said(worker) for worker in workers]
    assert sorted(map(str, answers)) == sorted(
        [str({"address": f"ipc://{private_dir}/worker.sock"})] + [str({"error": "AddressInUse"})] * 3
    )
    with closing(connect(f"{private_dir}/worker.sock")) as channel:
        channel.send(Frames(b"alive"))
        assert channel.receive(WAIT_S).control == b"alive"


def test_a_worker_ends_with_its_standard_input(start: StartProcess, address: str) -> None:
    worker = start(address, "--watch-stdin")
    said(worker)
    assert worker.stdin is not None
    worker.stdin.close()
    assert said(worker) == {"interrupted": True}
    assert worker.wait(WAIT_S) == 0


def test_a_watched_descriptor_that_becomes_readable_interrupts(address: str) -> None:
    reader, writer = os.pipe()
    try:
        with closing(listen(address, watch_fd=reader)) as listener:
            assert listener.receive(0.01) is None
            assert not listener.interrupted
            os.write(writer, b"stop")
            assert listener.receive(None) is None
            assert listener.interrupted
        os.fstat(reader)  # it stays the caller's
    finally:
        os.close(reader)
        os.close(writer)


def test_the_socket_is_ours_alone_and_the_umask_is_left_as_it_was(private_dir: Path) -> None:
    path = private_dir / "worker.sock"
    before = os.umask(0o022)
    try:
        with closing(listen(str(path))):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE((private_dir / "worker.sock.lock").stat().st_mode) == 0o600
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    assert list(private_dir.iterdir()) == []


STRANGER = """
import os, socket, sys
uid, path = int(sys.argv[1]), sys.argv[2]
os.setgroups([]); os.setgid(uid); os.setuid(uid)
with socket.socket(socket.AF_UNIX) as line:
    line.settimeout(20)
    line.connect(path)
    try:
        print(len(line.recv(1)))
    except ConnectionResetError:
        print(0)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(("uid", "bytes_read"), [(0, 1), (65_534, 0)])
def test_another_user_who_reaches_the_socket_is_shut_out(uid: int, bytes_read: int) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:  # pytest's own directories let no stranger in
        Path(directory).chmod(0o755)
        path = Path(directory) / "worker.sock"
        with closing(listen(str(path))):
            path.chmod(0o777)  # as if the file's permissions had failed
            command = [sys.executable, "-I", "-c", STRANGER, str(uid), str(path)]
            output = subprocess.run(command, capture_output=True, text=True, cwd="/", check=True).stdout
            assert int(output) == bytes_read
