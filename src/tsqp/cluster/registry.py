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

    Ray gives up an actor that raises as it begins. So only the first one raises, as somebody waits for its front; one
    that is started again begins without a front where there cannot be one yet. Its methods are called from Ray's
    threads, one at a time; the roster is kept by a thread of its own.
    """

    def __init__(self, name: str, path: str) -> None:
        self._directory = ClusterDirectory(name, Path(path))
        self._lock = threading.Lock()
        self._book = Book(time.time_ns() // 1_000_000)  # higher than any before it
        self._front: ListeningProcess | None = None
        self._ended = threading.Event()
        self._written = -1
        record = self._record()
        self._expect(record)
        try:
            self._write()
            self._start_front()
        except (TsqpError, OSError) as error:
            if not record.front:
                raise
            log.error("%s", error)
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    def reload(self) -> None:
        """The directory says which workers there are to be. Raises ClusterError."""
        self._expect(self._record())
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
        process = self._front
        front = "" if process is None or process.ended else process.address
        with self._lock:
            return msgspec.json.encode(View(self._book.epoch, front, tuple(self._book.entries(time.monotonic()))))

    def front(self) -> str:
        """Its address, with the port that it took."""
        process = self._front
        return "" if process is None else process.address

    def close(self) -> None:
        """End the front. Workers may go on speaking; nobody hears them."""
        self._ended.set()
        self._keeper.join()
        self._close_front()

    def _expect(self, record: Record) -> None:
        """The workers of a record are those that there are to be."""
        layout = record.layout
        with self._lock:
            self._book.expect({number: layout.shard_of(number) for number in range(layout.workers)})

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

    def _close_front(self) -> None:
        front, self._front = self._front, None
        if front is not None:
            front.close()

    def _keep(self) -> None:
        """Drop workers that are silent, and start a front where there is none, or none any more."""
        while not self._ended.wait(INTERVAL_S):
            try:
                self._write()
                if self._front is None or self._front.ended:
                    self._close_front()
                    self._start_front()
            except (TsqpError, OSError) as error:  # a full disk, a port that somebody took meanwhile: tried again
                log.error("%s", error)

    def _record(self) -> Record:
        record = self._directory.read()
        if record is None:
            raise ClusterError("the cluster's directory is gone")
        return record
