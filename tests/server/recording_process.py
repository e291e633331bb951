"""A worker that may be killed and is there again at once; run as a module, with MODEL ADDRESS SEEN.

This process reads the weights once and computes nothing. Each life of the worker is a fork of it, which writes what it
is sent to a file of its own in the directory SEEN before it answers. All of it ends with its standard input.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch

import tests.cached_loops  # noqa: F401  (before anything that has loops)
from tests.commands import Home
from tests.trusted.guard.fakes import Array
from tests.trusted.guard.hostile import store_of
from tsqp.untrusted.store import WeightStore
from tsqp.untrusted.worker import Worker
from tsqp.wire.channel import Arrival, Frames
from tsqp.wire.codec import decode_to_worker
from tsqp.wire.messages import Product
from tsqp.wire.transport import listen

_HEADER_BYTES = 16  # before each payload: its rows and its bytes, int64


class Recorder(Worker):
    """Writes down the input of each product, so that being killed loses none that was answered."""

    def __init__(self, store: WeightStore, file: int) -> None:
        super().__init__(store)
        self._file = file

    def answer(self, arrival: Arrival) -> Frames | None:
        call = decode_to_worker(arrival.frames.control)
        if isinstance(call, Product):
            payload = bytes(arrival.frames.tensors[0])
            os.write(self._file, np.array([call.rows, len(payload)], np.int64).tobytes() + payload)
        return super().answer(arrival)


def read_seen(directory: Path) -> list[Array]:
    """What all lives were sent, uint32 (rows, K) for each product. The last one of a life may be cut."""
    found: list[Array] = []
    for path in directory.iterdir():
        data, at = path.read_bytes(), 0
        while at + _HEADER_BYTES <= len(data):
            rows, size = np.frombuffer(data[at : at + _HEADER_BYTES], np.int64).tolist()
            at += _HEADER_BYTES + size
            if at <= len(data):
                found.append(np.frombuffer(data[at - size : at], np.uint32).reshape(rows, -1))
    return found


@contextmanager
def recording(home: Home, model: Path, seen: Path) -> Iterator[tuple[str, int]]:
    """The address of such a worker, and the process whose child it is, whichever life it has."""
    address = f"shm://{home.runtime}/recorder.sock"
    command = [sys.executable, "-m", __name__, str(model), address, str(seen)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=home.environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"listens\n"
            yield address, process.pid
        finally:
            process.stdin.close()


def live(store: WeightStore, address: str, seen: Path, life: int) -> None:
    """One life, until it is killed or the standard input ends."""
    file = os.open(seen / f"{life:04d}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    with closing(listen(address, watch_fd=sys.stdin.fileno())) as listener:
        if not life:
            os.write(sys.stdout.fileno(), b"listens\n")
        Recorder(store, file).serve(listener)


def main(model: str, address: str, seen: str) -> None:
    """One life after another, until one ends by itself."""
    torch.set_num_threads(1)  # a fork has none of the threads of a pool, and would wait for them
    store = store_of(model)
    for life in range(10_000):
        process = os.fork()
        if not process:
            live(store, address, Path(seen), life)
            os._exit(0)
        if os.waitpid(process, 0)[1] == 0:
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
