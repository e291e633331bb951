"""Two users of one machine over shm: each side says whom it means, and the kernel says who is there."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.wire.links import arrived
from tsqp.errors import OptionError
from tsqp.wire.channel import Frames, Listener
from tsqp.wire.transport import connect, listen
from tsqp.wire.transport.users import user_id

ROOT, OWN, OTHER, THIRD = 0, os.geteuid(), 54_321, 54_322
needs_root = pytest.mark.skipif(OWN != ROOT, reason="only root can become another user")

# Modules are loaded first: another user need not be able to read them.
CLIENT = """
import os, sys
from tsqp.errors import TsqpError
from tsqp.wire.channel import Frames
from tsqp.wire.transport import connect
me, address, worker = int(sys.argv[1]), sys.argv[2], None if sys.argv[3] == "-" else int(sys.argv[3])
os.setgroups([]); os.setgid(me); os.setuid(me)
try:
    channel = connect(address, user=worker, arena_bytes=1 << 20)
    channel.send(Frames(b"call", (memoryview(b"x" * 64),)), 64)
    print("answer", bytes(channel.receive(100.0).tensors[0][:4]).decode())
except TsqpError as error:
    print(type(error).__name__, error)
"""


# Without this side's checks: it offers a file of the worker's user as its arena, and says what comes back.
BY_PATH = """
import os, socket, sys
from tsqp.wire.transport.shm.packets import *
me, path, victim = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.setgroups([]); os.setgid(me); os.setuid(me)
line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
line.connect(path)
line.send(encode_opening(Opening(SHM_VERSION, victim)))
print(decode_answer(line.recv(8192)).control.decode())
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A path for a socket in a directory of this user that all may enter, as a service's under /run."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory) / "worker.sock"


def client(user: int, path: Path, worker: int | str) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-c", CLIENT, str(user), f"shm://{path}", str(worker)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def answered(listener: Listener) -> None:
    arrival = arrived(listener)
    assert arrival.reply is not None
    arrival.reply[:] = b"done" * (len(arrival.reply) // 4)
    listener.send(arrival, Frames(b"done", (arrival.reply,)))


@needs_root
def test_a_user_who_was_named_is_served_and_this_one_too(place: Path) -> None:
    with closing(listen(f"shm://{place}", users=[OTHER])) as listener:
        assert stat.S_IMODE(place.stat().st_mode) == 0o666
        assert stat.S_IMODE(place.with_name("worker.sock.lock").stat().st_mode) == 0o600
        for user, worker in ((OTHER, ROOT), (OWN, "-"), (OWN, OWN)):
            with client(user, place, worker) as process:
                answered(listener)
                assert process.communicate()[0] == "answer done\n"


@needs_root
def test_a_user_who_was_not_named_is_shut_out_though_the_socket_is_open_to_all(place: Path) -> None:
    with closing(listen(f"shm://{place}", users=[OTHER])) as listener, client(THIRD, place, ROOT) as process:
        while process.poll() is None:
            listener.receive(0.01)
        out = process.communicate()[0]
        assert out.startswith("WorkerLost"), out


@needs_root
@pytest.mark.parametrize("user", [OWN, OTHER])
def test_another_user_does_not_choose_which_file_of_this_one_is_mapped(place: Path, user: int) -> None:
    """The worker would read it and write products into it, with rights that the client does not have."""
    victim = place.with_name("a file of the worker")
    victim.write_bytes(b"S" * 4096)
    victim.chmod(0o600)
    command = [sys.executable, "-P", "-c", BY_PATH, str(user), str(place), str(victim)]
    with (
        closing(listen(f"shm://{place}", users=[OTHER])) as listener,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
    ):
        while process.poll() is None:
            listener.receive(0.01)
        assert process.communicate()[0] == ("\n" if user == OWN else "a file as arena, and from another user\n")


@needs_root
@pytest.mark.parametrize(("worker", "told"), [(THIRD, "AddressError"), ("-", "PathRefused")])
def test_a_worker_of_another_user_than_the_one_meant_is_not_used(place: Path, worker: int | str, told: str) -> None:
    with closing(listen(f"shm://{place}", users=[OTHER])), client(OTHER, place, worker) as process:
        out = process.communicate()[0]
        assert out.startswith(told), out
        assert "another user" in out or f"other than {THIRD}" in out


@needs_root
def test_a_socket_that_lets_nobody_else_in_says_so(place: Path) -> None:
    with closing(listen(f"shm://{place}")), client(OTHER, place, ROOT) as process:
        out = process.communicate()[0]
        assert out.startswith("WorkerUnreachable"), out
        assert "may not connect" in out


def test_without_other_users_the_socket_is_this_users_alone(place: Path) -> None:
    with closing(listen(f"shm://{place}", users=[])):
        assert stat.S_IMODE(place.stat().st_mode) == 0o600


def test_users_are_for_shm_alone(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="users can only be chosen for shm"):
        listen(f"ipc://{tmp_path}/x", users=[OTHER])
    with pytest.raises(OptionError, match="user can only be chosen for shm"):
        connect(f"ipc://{tmp_path}/x", user=OTHER)


def test_a_user_has_a_name_or_a_number() -> None:
    assert user_id("root", "allow_user") == ROOT
    assert user_id("10001", "allow_user") == 10_001
    for wrong in ("nobody-has-this-name", "", "-1", "\0", "١"):
        with pytest.raises(OptionError, match=r"^worker\.user: this machine has no user") as refused:
            user_id(wrong, "worker.user")
        assert refused.value.fields == ("worker.user",)
