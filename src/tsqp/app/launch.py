"""Starts a worker beside this process and stops it again.

The worker is another program: it gets an environment of its own, three pipes and no other descriptor. It ends when
its standard input does, so it cannot outlive this process, however that ends.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from types import TracebackType
from typing import IO

import msgspec

from tsqp.errors import WorkerUnreachable
from tsqp.spec.dtype import DtypeName

# What a worker needs to find its interpreter, its model and its device. Nothing else of this side's environment.
PASSED_ON = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "XDG_RUNTIME_DIR",
    "XDG_CACHE_HOME",
    "TSQP_CACHE",
    "HF_HOME",
    "HF_HUB_CACHE",
    "PYTHONPATH",
    "PYTHONWARNINGS",
    "LD_LIBRARY_PATH",
    "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES",
)
START_TIMEOUT_S = 600.0  # a large model takes minutes to read from a slow disk
STOP_TIMEOUT_S = 5.0


class Ready(msgspec.Struct, frozen=True):
    """The one line a worker writes to its standard output, when it listens."""

    address: str


class LocalWorker:
    """A worker process that lives as long as this object. Start it, do other work, then ``wait_ready``."""

    def __init__(self, model: str, *, device: str, dtype: DtypeName, threads: int | None) -> None:
        command = [sys.executable, "-m", "tsqp.untrusted", "--model", model, "--device", device, "--dtype", dtype]
        if threads is not None:
            command += ["--threads", str(threads)]
        self._process = subprocess.Popen(
            [*command, "--exit-with-stdin"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=worker_environment(),
            start_new_session=True,  # Ctrl-C is for this side; it ends the worker in good order
        )
        self._errors: deque[str] = deque(maxlen=50)
        self._drain = threading.Thread(target=self._collect, args=(self._process.stderr,), daemon=True)
        self._drain.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> str:
        """The address the worker listens on. Raises WorkerUnreachable with the worker's own last words."""
        output = self._process.stdout
        if output is None:
            raise WorkerUnreachable("the worker was started without a pipe")
        deadline = time.monotonic() + timeout_s
        line = b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([output], [], [], left)[0]:
                self.close()
                raise WorkerUnreachable(f"the worker was not ready within {timeout_s:.0f} s")
            piece = os.read(output.fileno(), 4096)
            if not piece:
                self.close()
                raise WorkerUnreachable(f"the worker did not start: {self.last_words()}")
            line += piece
        try:
            return msgspec.json.decode(line, type=Ready).address
        except msgspec.MsgspecError:
            self.close()
            raise WorkerUnreachable("the worker did not say where it listens") from None

    def last_words(self) -> str:
        """How the worker ended, or the last line of its standard error."""
        self._drain.join(timeout=1.0)
        code = self._process.poll()
        if code is not None and code < 0:
            return f"it was ended by {signal.Signals(-code).name}"
        for line in reversed(self._errors):
            if line.strip():
                return line.strip().removeprefix("tsqp worker: ")
        return "it said nothing" if code is None else f"it ended with exit code {code}"

    def close(self) -> None:
        """End the worker: politely, then not. Closing twice is allowed."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._drain.join()

    def __enter__(self) -> LocalWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _collect(self, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                self._errors.append(line.decode(errors="replace"))


def worker_environment() -> dict[str, str]:
    """The environment of a worker started here."""
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    # This side has read the checkpoint already, so the worker finds it on disk and needs neither network nor token.
    environment["HF_HUB_OFFLINE"] = "1"
    # Both processes use the same cores in turn: a thread pool that spins while it waits would take them from the other.
    environment["OMP_WAIT_POLICY"] = "PASSIVE"
    return environment
