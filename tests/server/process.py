"""``tsqp serve`` in a process of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.commands import LIMIT_S, Home, children, read_until, wait_gone


@dataclass
class Serving:
    """A server in a process of its own. ``log``: what it has written to standard error, whole once it has ended."""

    process: subprocess.Popen[bytes]
    worker: int | None
    address: str
    metrics_address: str | None
    log: list[str] = field(default_factory=list)

    def ended(self) -> int:
        """The exit code, once server and worker have ended."""
        code = self.process.wait(LIMIT_S)
        if self.worker is not None:
            wait_gone(self.worker)
        return code


@contextlib.contextmanager
def serving(home: Home, *options: object) -> Iterator[Serving]:
    """A server that is ready, killed at the end if it is still there."""
    with home.started("serve", "--json", *map(str, options)) as process:
        errors = process.stderr
        assert errors is not None
        log: list[str] = []
        reader = threading.Thread(target=lambda: log.extend(line.decode() for line in errors))
        reader.start()
        try:
            ready = json.loads(read_until(process, b"\n"))
            workers = children(process.pid)
            yield Serving(process, workers[0] if workers else None, ready["address"], ready["metrics_address"], log)
        finally:
            process.kill()
            reader.join()
