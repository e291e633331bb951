"""Rosters in files, as whoever places workers writes them, and fronts that hand them out."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tsqp.wire.roster import Member, roster_document
from tsqp.wire.transport.address import parse_address
from tsqp.wire.transport.front import Front
from tsqp.wire.transport.keys import WorkerKeys

_WAIT_S = 20.0


def replace(path: Path, document: bytes) -> None:
    """The file has this content from now on, and never a part of it."""
    path.with_suffix(".new").write_bytes(document)
    path.with_suffix(".new").replace(path)


class RosterWriter:
    """A roster in a file, with an epoch that grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.epoch = 0

    @property
    def address(self) -> str:
        return f"roster://{self.path}"

    def names(self, *members: Member) -> None:
        """The workers there are from now on."""
        self.epoch += 1
        replace(self.path, roster_document(self.epoch, list(members)))


@contextmanager
def front_process(
    path: Path, *more: str, listen: str = "tcp://127.0.0.1:0"
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A front with a file, and its address."""
    command = [sys.executable, "-m", "tsqp.untrusted.front", "--listen", listen, "--roster", str(path)]
    with subprocess.Popen([*command, *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())["address"]
        finally:
            process.kill()


@contextmanager
def front_thread(document: Callable[[], bytes], security: WorkerKeys | None = None) -> Iterator[str]:
    """The address of a front in this process, which answers with whatever ``document`` gives."""
    with closing(Front.listen(parse_address("tcp://127.0.0.1:0"), security)) as served:
        thread = threading.Thread(target=served.serve, args=(document,))
        thread.start()
        try:
            yield f"roster+{served.address}"
        finally:
            served.interrupt()
            thread.join(_WAIT_S)


def not_utf8(document: bytes) -> bytes:
    """A document that is one of JSON but for a byte of its first address, which no text has."""
    place = document.index(b'"address":"') + len(b'"address":"')
    return document[:place] + b"\xff" + document[place + 1 :]
