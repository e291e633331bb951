"""``tsqp serve`` in a process of its own, as a benchmark starts it: on free ports of loopback, with its metrics."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from types import TracebackType

import requests
from prometheus_client.parser import text_string_to_metric_families

from tsqp.bench.child import ready_line
from tsqp.errors import WorkerUnreachable
from tsqp.launch.local import worker_environment

LOOK_S = 0.1
LIMIT_S = 600.0  # for pads
STOP_S = 60.0


class ServerProcess:
    """A server with the ``options`` given. Raises WorkerUnreachable where it does not start.

    ``address``: without a path; ``model``: what it calls its model.
    """

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-m", "tsqp.bench.server_child", "serve", "--json", "--port", "0"]
        # No variables of the user's: TSQP_MAX_RUNNING and the like would change what is measured.
        self._process = subprocess.Popen(
            [*command, "--metrics-port", "0", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=worker_environment(),
        )
        self._http = requests.Session()
        self._http.trust_env = False
        try:
            ready = ready_line(self._process)
        except BaseException:
            self.close()
            raise
        self.address, self.model = str(ready["address"]), str(ready["model"])
        self._metrics = str(ready["metrics_address"])

    def metrics(self) -> dict[str, float]:
        """Its metrics without labels, by name. Raises WorkerUnreachable."""
        try:
            page = self._http.get(self._metrics, timeout=STOP_S)
            page.raise_for_status()
        except requests.RequestException as error:
            raise WorkerUnreachable("the measured server went away; what it said is above") from error
        return {
            sample.name: sample.value
            for family in text_string_to_metric_families(page.text)
            for sample in family.samples
        }

    def close(self) -> None:
        """End it: politely, then not."""
        self._http.close()
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def wait_for_pads(metrics: Callable[[], dict[str, float]], told: Callable[[float, float], None]) -> tuple[float, float]:
    """Wait until all pads that a server keeps are ready; ``told`` how many tokens' are, and how many there are to be.

    ``metrics``: as ServerProcess has them. Returns tokens whose pads were made meanwhile, and seconds. Raises
    WorkerUnreachable.
    """
    start, first = time.perf_counter(), None
    while True:
        found = metrics()
        ready, wanted = found["tsqp:pads_ready"], found["tsqp:pads_ahead"]
        first = ready if first is None else first
        seconds = time.perf_counter() - start
        if ready >= wanted:
            return ready - first, seconds
        if seconds > LIMIT_S:
            raise WorkerUnreachable(f"the measured server has made {ready:.0f} of {wanted:.0f} pads")
        told(ready, wanted)
        time.sleep(LOOK_S)
