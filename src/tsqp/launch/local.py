"""Starts a worker beside this process and stops it again.

Covers: a worker gets the environment listed here, three pipes and no other descriptor (test_faults.py); it ends when
its standard input does, so it cannot outlive this process (test_faults.py); it listens where it was told to and
nowhere else, and whatever it writes is bounded and printed without control characters (test_local.py).
Does not cover: a worker of the same user id can do to this process what the user can. Assumes: the interpreter and the
installed package are what they were.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from types import TracebackType
from typing import IO, Self

import msgspec

from tsqp.config.dtype import ComputeDtype
from tsqp.errors import ChannelError, OptionError, PathRefused, WorkerUnreachable
from tsqp.wire.printable import printable
from tsqp.wire.transport import new_shm_address
from tsqp.wire.transport.runtime_dir import reclaim_stale, runtime_directory

# -P: the directory a user happens to be in must not be one that modules are loaded from.
WORKER_MODULE = "tsqp.untrusted"
WORKER_COMMAND = (sys.executable, "-P", "-m", WORKER_MODULE)

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
    *("CC", "TRITON_LIBCUDA_PATH", "TRITON_PTXAS_PATH"),  # what Triton compiles its kernels by
)
START_TIMEOUT_S = 600.0  # a large model takes minutes to read from a slow disk
STOP_TIMEOUT_S = 5.0
MAX_LINE_BYTES = 4096


class Ready(msgspec.Struct, frozen=True):
    """The one line a process writes to its standard output, when it listens."""

    address: str


class ListeningProcess:
    """A process that lives as long as this object. Start it, do other work, then ``wait_ready``.

    ``command``: takes ``--exit-with-stdin``, and says where it listens. ``address``: where it has to; where that ends
    with ``:0``, at any port. ``what``: its name in errors.
    """

    def __init__(self, command: Sequence[str], address: str, *, environment: dict[str, str], what: str) -> None:
        self.address = address
        self._what = what
        self._process = subprocess.Popen(
            [*command, "--exit-with-stdin"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is for this side; it ends the process in good order
        )
        self._listens = False
        self._closed = False
        self._errors: deque[str] = deque(maxlen=50)
        self._drain = threading.Thread(target=self._collect, args=(self._process.stderr,), daemon=True)
        self._drain.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def listens(self) -> bool:
        """Whether it has said that it does."""
        return self._listens

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> str:
        """Wait until it listens; returns its address. Raises WorkerUnreachable with the process's last words.

        Once it has said that it listens, there is nothing to wait for.
        """
        output = self._process.stdout
        if self._listens:
            return self.address
        if output is None:
            raise WorkerUnreachable(f"the {self._what} was started without a pipe")
        deadline = time.monotonic() + timeout_s
        ready_to_read = select.poll()  # select() knows no descriptor beyond 1,023
        ready_to_read.register(output, select.POLLIN)
        line = b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not ready_to_read.poll(left * 1000):
                self.close()
                raise WorkerUnreachable(f"the {self._what} was not ready within {timeout_s:.0f} s")
            piece = os.read(output.fileno(), 4096)
            line += piece
            if not piece or len(line) > MAX_LINE_BYTES:
                self.close()
                raise WorkerUnreachable(f"the {self._what} did not start: {self.last_words()}")
        output.close()  # it has nothing more to say
        try:
            ready = msgspec.json.decode(line, type=Ready)
        except (msgspec.MsgspecError, ValueError):
            ready = None
        if ready is None or not listens_there(ready.address, self.address):
            self.close()
            raise WorkerUnreachable(f"the {self._what} does not listen where it was told to")
        self.address = ready.address
        self._listens = True
        return self.address

    def last_words(self) -> str:
        """How the worker ended, or the last line of its standard error."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        self._drain.join(timeout=1.0)
        code = self._process.returncode
        if code is not None and code < 0:
            return f"it was ended by {signal_name(-code)}"
        for line in reversed(self._errors):
            if line.strip():
                return printable(line.strip().removeprefix(f"tsqp {self._what}: ").removeprefix("error: "))
        return "it said nothing" if code is None else f"it ended with exit code {code}"

    def kill(self) -> None:
        """End it at once, whatever it does; ``close`` it too. Another thread may be waiting for it."""
        if self._process.poll() is None:
            self._process.kill()

    def close(self) -> None:
        """End it: politely, then not. Closing twice is allowed."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        if self._process.poll() is None:
            self._process.terminate()  # it may be reading weights, and look at its standard input only afterwards
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if not self._closed:  # later the number may be that of somebody else's processes
            self._closed = True
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # whatever it started: its session is its own
        self._drain.join(timeout=1.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _collect(self, stream: IO[bytes]) -> None:
        with stream:
            while line := stream.readline(MAX_LINE_BYTES):
                self._errors.append(line.decode(errors="replace"))


class LocalWorker(ListeningProcess):
    """A worker at a fresh shm address. Raises OptionError where the worker's code is not installed, as in the image of
    the trusted side."""

    def __init__(
        self, model: str, *, device: str, dtype: ComputeDtype, threads: int | None, compiled: bool = False
    ) -> None:
        if find_spec(WORKER_MODULE) is None:
            raise OptionError("this installation is the trusted side alone: name a worker that runs elsewhere")
        address = new_shm_address()
        command = [*WORKER_COMMAND, "--model", model, "--device", device, "--dtype", dtype, "--listen", address]
        if compiled:
            command.append("--compile")
        if threads is not None:
            command += ["--threads", str(threads)]
        super().__init__(command, address, environment=worker_environment(), what="worker")

    def close(self) -> None:
        """End the worker: politely, then not. Closing twice is allowed."""
        super().close()
        with suppress(ChannelError, PathRefused):
            reclaim_stale(runtime_directory())  # a worker that was killed leaves its socket


def listens_there(said: str, told: str) -> bool:
    """Whether an address is the one a process was told, where a port of 0 leaves the port to the process."""
    if not told.endswith(":0"):
        return said == told
    host, _, port = said.rpartition(":")
    return host == told[:-2] and re.fullmatch(r"[1-9][0-9]{0,4}", port) is not None


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9; real-time signals have no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def worker_environment() -> dict[str, str]:
    """The environment of a worker started here."""
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    # This side has read the checkpoint already, so the worker finds it on disk and needs neither network nor token.
    environment["HF_HUB_OFFLINE"] = "1"
    # Both processes use the same cores in turn: a thread pool that spins while it waits would take them from the other.
    environment["OMP_WAIT_POLICY"] = "PASSIVE"
    return environment
