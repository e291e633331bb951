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


@pytest.fixture(params=["mem", "ipc", "shm", "shm-file", "tcp", "curve"])
def link(request: pytest.FixtureRequest, private_dir: Path) -> Link:
    return make_link(request.param, private_dir)


@pytest.fixture
def listener(link: Link) -> Iterator[Listener]:
    with closing(link.listen()) as listener:
        yield listener


@pytest.fixture
def channel(link: Link, listener: Listener) -> Iterator[Channel]:
    with closing(link.connect(listener)) as channel:
        yield channel
