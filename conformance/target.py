"""The server as clients see it."""

from __future__ import annotations

import time
import urllib.request
from dataclasses import dataclass

LIMIT_S = 60.0


@dataclass(frozen=True)
class Target:
    """``url``: without ``/v1``. ``directory``: of the model, for who needs its tokenizer."""

    url: str
    metrics_url: str
    key: str
    model: str
    directory: str

    @property
    def api(self) -> str:
        """What clients call the base URL."""
        return f"{self.url}/v1"

    def metrics(self) -> dict[str, float]:
        """Each metric with its labels, as Prometheus writes it, and its value."""
        with urllib.request.urlopen(self.metrics_url, timeout=LIMIT_S) as page:
            lines = page.read().decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    def total(self, name: str, label: str = "") -> float:
        """The sum of a metric over its labels, of those alone that have ``label``."""
        return sum(value for key, value in self.metrics().items() if key.partition("{")[0] == name and label in key)

    def aborted(self) -> float:
        """Requests that clients have given up."""
        return self.total("vllm:request_success_total", 'finished_reason="abort"')

    def wait_idle(self) -> None:
        """Until no request is under way; fails where one stays."""
        deadline = time.monotonic() + LIMIT_S
        while self.total("vllm:num_requests_running") or self.total("vllm:num_requests_waiting"):
            assert time.monotonic() < deadline, "a request is still under way"
            time.sleep(0.01)
