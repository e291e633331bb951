"""An actor and its worker: what is announced, which keys there are, and that neither outlives the other."""

from __future__ import annotations

import fcntl
import os
import queue
import signal
import sys
import tempfile
import threading
from pathlib import Path

import msgspec
import pytest

from tests.commands import LIMIT_S
from tsqp.cluster import holder
from tsqp.cluster.book import Said
from tsqp.cluster.holder import HeldWorker, Holder, Task
from tsqp.cluster.state import Started
from tsqp.errors import WorkerUnreachable
from tsqp.wire.transport.keys import create_keys, load_public, load_secret

# A worker that says what it was told, and where it listens.
WORKER = """
import json, os, pathlib, sys
told = dict(zip(sys.argv[1::2], sys.argv[2::2]))
keys = [pathlib.Path(told[name]).read_text() for name in ("--key", "--allow") if name in told]
pathlib.Path(os.environ["HOME"], "told.json").write_text(json.dumps({**told, "keys": keys}))
print(json.dumps({"address": told["--listen"][:-1] + "7001"}), flush=True)
sys.stdin.read()
"""


def task(*, allow: tuple[str, ...] = (), whole: bool = False) -> Task:
    started = Started("synthetic:tiny", "cpu", 3, "127.0.0.1", allow)
    return Task(4, "0..3/0..1of2", whole, "127.0.0.1", started, {"TSQP_CLUSTER": "/x"})


@pytest.fixture(autouse=True)
def _fake_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(holder, "WORKER_COMMAND", (sys.executable, "-c", WORKER))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "keys").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "keys"))


def told(tmp_path: Path) -> dict[str, object]:
    return dict(msgspec.json.decode((tmp_path / "told.json").read_bytes()))


def test_a_worker_is_told_its_shard_and_is_announced_as_it_is(tmp_path: Path) -> None:
    held = HeldWorker(task())
    with held.process:
        assert held.said.member.address == "tcp://127.0.0.1:7001"
        assert (held.said.number, held.said.member.shard, held.said.member.key) == (4, "0..3/0..1of2", None)
        assert held.said.pid == held.process.pid
        given = told(tmp_path)
    assert (given["--shard"], given["--dtype"], given["--threads"]) == ("0..3/0..1of2", "field", "3")
    assert given["keys"] == []
    with HeldWorker(task(whole=True)).process:
        assert "--shard" not in told(tmp_path)


def test_with_keys_each_worker_has_a_fresh_pair_that_leaves_no_file(tmp_path: Path) -> None:
    client = load_public(create_keys(tmp_path, "me").public).decode()
    found = set()
    for _ in range(2):
        held = HeldWorker(task(allow=(client,)))
        with held.process:
            keys = told(tmp_path)["keys"]
        assert isinstance(keys, list)
        (tmp_path / "own").write_text(keys[0])
        (tmp_path / "own").chmod(0o600)
        assert load_secret(tmp_path / "own").public.decode() == held.said.member.key
        assert client in keys[1]
        found.add(held.said.member.key)
        assert list((tmp_path / "keys").iterdir()) == []
    assert len(found) == 2


def test_keys_that_a_killed_actor_left_are_removed_by_the_next_one(tmp_path: Path) -> None:
    """Not those of an actor that lives: its worker may be about to read them."""
    left, others = (tmp_path / "keys" / f"tsqp-keys-{name}" for name in ("left", "others"))
    for directory in (left, others):
        directory.mkdir(mode=0o700)
        create_keys(directory, "worker")
    lock = os.open(others, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with HeldWorker(task()).process:
            assert list((tmp_path / "keys").iterdir()) == [others]
    finally:
        os.close(lock)


def test_a_worker_that_cannot_start_is_said_once_and_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = "import sys; print('tsqp worker: error: no such model', file=sys.stderr); sys.exit(1)"
    monkeypatch.setattr(holder, "WORKER_COMMAND", (sys.executable, "-c", broken))
    with pytest.raises(WorkerUnreachable, match="the worker did not start: no such model"):
        HeldWorker(task())
    encoded = msgspec.json.encode(task())
    assert Holder(encoded, lambda _: None, "n", again=False).ready() == "the worker did not start: no such model"
    ended: list[int] = []

    def end(code: int) -> None:
        ended.append(code)
        raise SystemExit

    monkeypatch.setattr(holder, "AGAIN_S", 0.0)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit):
        Holder(encoded, lambda _: None, "n", again=True)
    assert ended == [1]


def test_it_speaks_while_its_worker_lives_and_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spoken: queue.Queue[bytes] = queue.Queue()
    ended = threading.Event()
    monkeypatch.setattr(holder, "INTERVAL_S", 0.01)
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    actor = Holder(msgspec.json.encode(task()), spoken.put, "node-1", again=False)
    assert actor.ready() == ""
    first, second = (msgspec.json.decode(spoken.get(timeout=LIMIT_S), type=Said) for _ in range(2))
    assert first == second
    assert first.node == "node-1"
    assert not ended.is_set()
    os.kill(first.pid, signal.SIGKILL)
    assert ended.wait(LIMIT_S)
