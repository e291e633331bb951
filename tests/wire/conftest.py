"""Fixtures for every test of the wire."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.wire.links import Link, make_link
from tsqp.wire.channel import Channel, Listener


@pytest.fixture
def private_dir() -> Iterator[Path]:
    """A directory that only this user can enter, with a path that leaves room for names of sockets."""
    with TemporaryDirectory(prefix="tsqp-w") as directory:
        yield Path(directory)


@pytest.fixture(params=["mem", "ipc", "shm", "shm-file", "cuda", "tcp", "curve"])
def link(request: pytest.FixtureRequest, private_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Link:
    if request.param == "cuda":  # both ends are one thread: nobody lets go of memory while the other end closes
        monkeypatch.setattr("tsqp.wire.transport.cuda.channel.PARTING_S", 0.0)
    return make_link(request.param, private_dir)


@pytest.fixture
def listener(link: Link) -> Iterator[Listener]:
    with closing(link.listen()) as listener:
        yield listener


@pytest.fixture
def channel(link: Link, listener: Listener) -> Iterator[Channel]:
    with closing(link.connect(listener)) as channel:
        yield channel
