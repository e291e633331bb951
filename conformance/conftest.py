"""One server for all clients."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.target import Target

ROOT = Path(__file__).parents[1]
PRODUCT = ROOT / ".venv" / "bin" / "python"
# A client asks nobody but the server: no list of prices, no hub.
ALONE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DO_NOT_TRACK": "1"}
os.environ.update(ALONE)  # before any client is imported


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """The server. At the end it must have had no fault of its own, and must end when it is told to."""
    directory = tmp_path_factory.mktemp("server")
    environment = {**os.environ, "TMPDIR": str(directory)}
    command = [PRODUCT, "-m", "conformance.serve", directory]
    with (
        (directory / "log").open("w") as log,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log) as process,
    ):
        try:
            assert process.stdout is not None
            made, ready = json.loads(process.stdout.readline()), json.loads(process.stdout.readline())
            yield Target(ready["address"], ready["metrics_address"], made["key"], ready["model"], made["directory"])
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    written = (directory / "log").read_text(encoding="utf-8")
    assert [line for line in written.splitlines() if "request" in line] == []


@pytest.fixture(autouse=True)
def _nothing_left(target: Target) -> Iterator[None]:
    """A client that is done leaves nothing behind."""
    yield
    target.wait_idle()
