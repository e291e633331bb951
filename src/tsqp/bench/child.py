"""A benchmark's own server in a process beside this one. It ends when its standard input does."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from contextlib import suppress
from types import TracebackType
from typing import Any

from tsqp.errors import WorkerFailed, WorkerUnreachable
from tsqp.launch.local import STOP_TIMEOUT_S, worker_environment

START_TIMEOUT_S = 600.0  # a large model takes minutes to read from a slow disk


class Child:
    """``python -m MODULE ARGUMENTS``; it writes one line of JSON when it is ready: with its ``address``, if it listens.

    ``environment``: a worker's, when None.
    """

    def __init__(self, module: str, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=worker_environment() if environment is None else environment,
            start_new_session=True,  # Ctrl-C is for this side
        )
        try:
            self.ready = ready_line(self._process)
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        """Where it listens."""
        return str(self.ready["address"])

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        """One line of JSON to its standard input, and the line that it answers. Raises WorkerFailed."""
        line, (questions, answers) = b"", (self._process.stdin, self._process.stdout)
        if questions is not None and answers is not None:
            with suppress(BrokenPipeError):
                questions.write(json.dumps(asked).encode() + b"\n")
                questions.flush()
                line = answers.readline()
        if not line.endswith(b"\n"):
            raise WorkerFailed("the benchmark's server went away; what it said is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it: politely, then not. Closing twice is allowed."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # of a question that nobody has read
                    pipe.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def ready_line(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The object that a server writes to standard output when it is ready. Raises WorkerUnreachable."""
    output = process.stdout
    if output is None or not select.select([output], [], [], START_TIMEOUT_S)[0]:
        raise WorkerUnreachable(f"the benchmark's server was not ready within {START_TIMEOUT_S:.0f} s")
    line = output.readline()
    if not line.endswith(b"\n"):
        raise WorkerUnreachable("the benchmark's server did not start; what it said is above")
    ready: dict[str, Any] = json.loads(line)
    return ready
