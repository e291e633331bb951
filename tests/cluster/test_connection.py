"""What is said where a Ray is not there: one of the cluster itself can be cleared away, somebody else's cannot."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.fake_pool import STARTED
from tsqp.cluster.connection import connected, listens
from tsqp.cluster.state import ClusterDirectory, Record
from tsqp.errors import ClusterError


@pytest.fixture
def directory(tmp_path: Path) -> ClusterDirectory:
    return ClusterDirectory("a", tmp_path / "a")


@pytest.fixture
def refused() -> Iterator[str]:
    """An address at which nobody listens, as long as the socket is there."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def record(address: str, *, own: bool) -> Record:
    return Record(2, "a", "here", "tsqp-a-0", address, own, "", "/t", "", STARTED, ("0..3",), 1, ())


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (True, r"the Ray of cluster a does not answer \(.*refused\): tsqp cluster down --name a clears it away"),
        (False, "the Ray at .* cannot be joined: .*refused"),
    ],
)
def test_a_ray_that_is_not_there(own: bool, said: str, directory: ClusterDirectory, refused: str) -> None:
    with pytest.raises(ClusterError, match=said), connected(directory, record(refused, own=own)):
        pass


def test_one_that_did_not_get_to_its_address_is_gone(directory: ClusterDirectory) -> None:
    assert not listens("")
    with (
        pytest.raises(ClusterError, match="the Ray of cluster a does not answer"),
        connected(directory, record("", own=True)),
    ):
        pass


def test_one_that_takes_connections_may_be_there(refused: str) -> None:
    assert not listens(refused)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert listens(f"127.0.0.1:{server.getsockname()[1]}")


def test_what_a_ray_prints_is_no_part_of_a_command(
    directory: ClusterDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its listener prints as long as this process is connected, from a thread of its own."""
    import ray

    def said(words: str) -> None:
        sys.stdout.write(words)

    monkeypatch.setattr(ray, "init", lambda **_: said("(raylet) a node came"))
    monkeypatch.setattr(ray, "shutdown", lambda: said("(raylet) the last words"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = record(f"127.0.0.1:{server.getsockname()[1]}", own=True)
        with connected(directory, there):
            thread = threading.Thread(target=said, args=("(raylet) a node went",))
            thread.start()
            thread.join()
        said("done")
    assert capsys.readouterr().out == "done"
