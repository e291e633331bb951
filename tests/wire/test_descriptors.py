"""Where descriptors run out, a connection is refused and the process goes on: libzmq would end it."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from tests.commands import LIMIT_S
from tsqp.errors import WorkerUnreachable
from tsqp.wire.transport import connect
from tsqp.wire.transport import zmq as transport
from tsqp.wire.transport.descriptors import PER_CONNECTION, SPARE, connections_left, descriptors_left

_UNTIL_NONE_IS_LEFT = """
import os, resource
from tsqp.errors import WorkerUnreachable
from tsqp.wire.transport import connect, listen
from tsqp.wire.transport.descriptors import descriptors_left

before = descriptors_left()
opened = os.pipe()
print(before - descriptors_left())
listener = listen("tcp://127.0.0.1:0")
opened = [connect(listener.address)]
before = descriptors_left()
opened.append(connect(listener.address))
print(before - descriptors_left())
limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (limit - descriptors_left() + 50, most))
try:
    while True:
        opened.append(connect(listener.address))
except WorkerUnreachable as error:
    print(len(opened), error, sep="\\n")
for _ in range(2):
    opened.pop().close()
opened.append(connect(listener.address))
print("again")
"""


def test_a_process_without_descriptors_goes_on() -> None:
    ended = subprocess.run([sys.executable, "-c", _UNTIL_NONE_IS_LEFT], capture_output=True, text=True, timeout=LIMIT_S)
    assert ended.returncode == 0, ended.stderr
    pipe, each, opened, error, again = ended.stdout.splitlines()
    assert int(pipe) == 2
    assert 1 < int(each) <= PER_CONNECTION  # with the listener's one, which is in the same process
    assert int(opened) > 4
    assert "too few descriptors left" in error
    assert again == "again"


def test_what_zeromq_cannot_do_is_said_of_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> None:
        raise zmq.ZMQError(errno.EMFILE)

    monkeypatch.setattr(transport, "_socket", none_left)
    with pytest.raises(WorkerUnreachable, match=r"^tcp://127\.0\.0\.1:9: cannot be connected to: Too many open files$"):
        connect("tcp://127.0.0.1:9")


def test_how_many_are_left_is_what_the_limit_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    def limited_to(count: int) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (count, -1))

    opened = 20  # of this process and no other test's: how many there really are is asked above
    monkeypatch.setattr(Path, "iterdir", lambda path: iter([path] * opened))
    limited_to(100_000)
    assert descriptors_left() == 100_000 - opened
    limited_to(opened + SPARE + 3 * PER_CONNECTION)
    assert connections_left() == 3
    limited_to(opened + SPARE + 3 * PER_CONNECTION - 1)
    assert connections_left() == 2
    limited_to(opened)
    assert connections_left() == 0
    limited_to(resource.RLIM_INFINITY)
    assert connections_left() > 4096


def test_where_there_is_none_to_look_with_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(path: Path) -> Iterator[Path]:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "iterdir", none_left)
    assert descriptors_left() == connections_left() == 0
