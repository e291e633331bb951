"""The registry writes what it hears, a front hands it out, and a front that ends is started again where it was."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from tests.cluster.fake_pool import STARTED
from tests.commands import wait_until
from tsqp.cluster import registry as registry_module
from tsqp.cluster.book import Said
from tsqp.cluster.registry import Registry, View
from tsqp.cluster.state import ClusterDirectory, Record
from tsqp.errors import ClusterError, WorkerUnreachable
from tsqp.wire.roster import Member, Roster, read_roster

RECORD = Record(2, "a", "here", "tsqp-a-0", "127.0.0.1:6379", True, "", "/t", "", STARTED, ("0..3",), 2, ())


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterDirectory:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    directory = ClusterDirectory("a")
    directory.write(RECORD)
    return directory


@pytest.fixture
def registry(directory: ClusterDirectory) -> Iterator[Registry]:
    with closing(Registry("a", str(directory.path))) as made:
        yield made


def said(number: int) -> bytes:
    return msgspec.json.encode(Said(number, "x", Member(f"tcp://127.0.0.1:{7000 + number}", "0..3"), "n", 1))


def roster(directory: ClusterDirectory) -> Roster:
    return read_roster(directory.roster.read_bytes())


def view(registry: Registry) -> View:
    return msgspec.json.decode(registry.view(), type=View)


def test_the_roster_is_what_was_heard_of_those_that_are_expected(
    directory: ClusterDirectory, registry: Registry
) -> None:
    assert roster(directory).workers == ()
    begun = roster(directory).epoch
    for number in range(3):
        registry.announce(said(number))
    assert [member.address[-1] for member in roster(directory).workers] == ["0", "1"]
    assert roster(directory).epoch > begun
    directory.write(msgspec.structs.replace(RECORD, replicas=1))
    registry.reload()
    assert [member.address[-1] for member in roster(directory).workers] == ["0"]
    assert [entry.state for entry in view(registry).workers] == ["listening"]
    assert view(registry).epoch == roster(directory).epoch
    directory.roster.unlink()
    registry.announce(said(0))
    assert len(roster(directory).workers) == 1


def test_a_front_that_ends_is_started_again_at_its_address(directory: ClusterDirectory, registry: Registry) -> None:
    front = registry.front()
    assert front.startswith("roster+tcp://127.0.0.1:")
    directory.write(msgspec.structs.replace(RECORD, front=front))
    before = registry._front
    assert before is not None
    os.kill(before.pid, signal.SIGKILL)
    wait_until(lambda: registry._front is not before and view(registry).front == front)


def test_one_whose_front_cannot_start_again_at_once_goes_on_trying(directory: ClusterDirectory) -> None:
    """Ray starts no actor a second time that fails as it starts. Here somebody has the port; or a disk is full."""
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        front = f"roster+tcp://127.0.0.1:{taken.getsockname()[1]}"
        directory.write(msgspec.structs.replace(RECORD, front=front))
        registry = Registry("a", str(directory.path))
    with closing(registry):
        registry.announce(said(0))
        assert len(roster(directory).workers) == 1
        wait_until(lambda: view(registry).front == front)


def test_a_front_that_never_was_is_an_error_for_who_waits_for_it(
    directory: ClusterDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "FRONT_COMMAND", (sys.executable, "-c", "raise SystemExit('no room')"))
    with pytest.raises(WorkerUnreachable, match="the front did not start: no room"):
        Registry("a", str(directory.path))


def test_one_that_is_started_again_has_a_higher_epoch_and_the_same_workers(directory: ClusterDirectory) -> None:
    with closing(Registry("a", str(directory.path))) as first:
        first.announce(said(0))
        before = roster(directory).epoch
    with closing(Registry("a", str(directory.path))) as second:
        assert roster(directory).epoch > before
        assert [entry.number for entry in view(second).workers] == [0, 1]


def test_without_a_directory_it_says_so(directory: ClusterDirectory) -> None:
    (directory.path / "cluster.json").unlink()
    with pytest.raises(ClusterError, match="directory is gone"):
        Registry("a", str(directory.path))
