"""An actor that hears of the workers, writes the roster, and keeps a front beside it that hands the roster out."""

from __future__ import annotations

import logging
import sys
import threading
import time
from pathlib import Path
from typing import Final

import msgspec

from tsqp.cluster.book import Book, Entry, Said
from tsqp.cluster.processes import MARK
from tsqp.cluster.state import ClusterDirectory, Record, replace_private
from tsqp.errors import ClusterError, TsqpError
from tsqp.launch.local import ListeningProcess, worker_environment
from tsqp.wire.roster import roster_document

FRONT_COMMAND = (sys.executable, "-P", "-m", "tsqp.untrusted.front")
FRONT_TIMEOUT_S = 60.0
INTERVAL_S: Final = 0.5
ROSTER = "roster+"

log = logging.getLogger("tsqp.cluster")


class View(msgspec.Struct, frozen=True):
    """What ``tsqp cluster status`` shows."""

    epoch: int
    front: str
    workers: tuple[Entry, ...]


class Registry:
    """It knows what the cluster's directory says and what workers say, so one that is started again knows the same.

    Its methods are called from Ray's threads, one at a time; the roster is kept by a thread of its own.
    """

    def __init__(self, name: str, path: str) -> None:
        self._directory = ClusterDirectory(name, Path(path))
        self._lock = threading.Lock()
        self._book = Book(time.time_ns() // 1_000_000)  # higher than any before it
        self._front: ListeningProcess | None = None
        self._ended = threading.Event()
        self._written = -1
        self.reload()
        self._write()
        self._start_front()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    def reload(self) -> None:
        """The directory says which workers there are to be. Raises ClusterError."""
        layout = self._record().layout
        with self._lock:
            self._book.expect({number: layout.shard_of(number) for number in range(layout.workers)})
        self._write()

    def announce(self, document: bytes) -> None:
        """A worker speaks: a ``Said`` in JSON."""
        said = msgspec.json.decode(document, type=Said)
        with self._lock:
            self._book.hear(said, time.monotonic())
        self._write()

    def view(self) -> bytes:
        """A ``View`` in JSON."""
        self._write()
        front = "" if self._front is None or self._front.ended else self._front.address
        with self._lock:
            return msgspec.json.encode(View(self._book.epoch, front, tuple(self._book.entries(time.monotonic()))))

    def front(self) -> str:
        """Its address, with the port that it took."""
        return "" if self._front is None else self._front.address

    def close(self) -> None:
        """End the front. Workers may go on speaking; nobody hears them."""
        self._ended.set()
        self._keeper.join()
        if self._front is not None:
            self._front.close()

    def _write(self) -> None:
        """The roster, where it has changed."""
        with self._lock:
            members = self._book.members(time.monotonic())
            if self._book.epoch != self._written or not self._directory.roster.exists():
                replace_private(self._directory.roster, roster_document(self._book.epoch, list(members)))
                self._written = self._book.epoch

    def _start_front(self) -> None:
        record = self._record()
        told = record.front or f"{ROSTER}tcp://{record.started.interface}:0"
        command = [*FRONT_COMMAND, "--listen", told.removeprefix(ROSTER), "--roster", str(self._directory.roster)]
        environment = worker_environment() | {MARK: str(self._directory.path)}
        front = ListeningProcess(command, told, environment=environment, what="front")
        front.wait_ready(FRONT_TIMEOUT_S)
        self._front = front

    def _keep(self) -> None:
        """Drop workers that are silent, and start a front again that has ended."""
        while not self._ended.wait(INTERVAL_S):
            try:
                self._write()
                if self._front is not None and self._front.ended:
                    self._front.close()
                    self._start_front()
            except (TsqpError, OSError) as error:  # a full disk, a port that somebody took meanwhile: tried again
                log.error("%s", error)

    def _record(self) -> Record:
        record = self._directory.read()
        if record is None:
            raise ClusterError("the cluster's directory is gone")
        return record
