"""A server in this process, in the main thread, until a client in another thread has done what it came for."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.commands import LIMIT_S
from tsqp import LLM
from tsqp.server.listening import Listening
from tsqp.server.ready import Ready
from tsqp.server.run import serve
from tsqp.server.settings import ServerSettings


@dataclass
class Server:
    """``gate``: passes wait for it. ``ended_at_once``: the exit codes with which the process would have ended."""

    llm: LLM
    gate: threading.Event
    ended_at_once: list[int]

    def run(
        self,
        client: Callable[[Ready], None],
        *,
        listening: Listening | None = None,
        settings: ServerSettings | None = None,
        api_keys: Path | None = None,
        names: Sequence[str] = ("tiny",),
        evidence: str | None = None,
    ) -> None:
        """Serve in this thread until ``client``, in another, has returned. Raises what it has raised."""
        with ThreadPoolExecutor(1) as pool:
            results = []

            def asking(ready: Ready) -> None:
                try:
                    client(ready)
                finally:
                    self.gate.set()
                    os.kill(os.getpid(), signal.SIGTERM)

            serve(
                lambda: self.llm,
                listening or Listening(port=0, metrics_port=0),
                settings or ServerSettings(),
                names=names,
                api_keys=api_keys,
                evidence=evidence,
                announce=lambda ready: results.append(pool.submit(asking, ready)),
            )
            results[0].result(LIMIT_S)
