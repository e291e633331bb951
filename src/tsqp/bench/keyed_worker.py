"""A worker for exact products over tcp with keys, as one on another machine is."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tsqp.api.config import RunConfig
from tsqp.bench.child import ready_line
from tsqp.launch.local import STOP_TIMEOUT_S, WORKER_COMMAND, worker_environment
from tsqp.wire.transport.keys import KeyFiles, create_keys


@dataclass(frozen=True)
class KeyedWorker:
    """Where it listens, and with which keys the trusted side talks to it."""

    address: str
    key: Path
    server_key: Path

    def of(self, run: RunConfig) -> RunConfig:
        """The same run by this worker."""
        return replace(run, worker=replace(run.worker, address=self.address, key=self.key, server_key=self.server_key))


@contextmanager
def keyed_worker(
    model: str, directory: Path, *, host: str = "127.0.0.1", inside: Sequence[str] = ()
) -> Iterator[KeyedWorker]:
    """Start one and end it. Its keys are made in ``directory``; ``inside``: a command that it is started by.

    Raises WorkerUnreachable.
    """
    worker, client = (create_keys(directory, name) for name in ("worker", "client"))
    command = [*inside, *WORKER_COMMAND, *_arguments(model, host, worker, client)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=worker_environment(), start_new_session=True
    )
    try:
        yield KeyedWorker(str(ready_line(process)["address"]), client.secret, worker.public)
    finally:
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _arguments(model: str, host: str, worker: KeyFiles, client: KeyFiles) -> list[str]:
    where = ["--model", model, "--dtype", "field", "--listen", f"tcp://{host}:0", "--exit-with-stdin"]
    return [*where, "--key", str(worker.secret), "--allow", str(client.public)]
