"""Server and worker as two users, each confined as its unit says: they answer together, and neither can do more."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.commands import LIMIT_S, remove_tree
from tests.deploy.confined import TOOLS, USERS, make_places, started
from tests.deploy.unit_files import DEPLOY, environment_of
from tests.families import tiny_model

SYSTEMD = DEPLOY / "systemd"
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]
# Loops of private modes are compiled for minutes where none are cached; what is tested here is the same in every mode.
OPTIONS = "--protection open --dtype float32 --no-compiled-kernels"
QUICK = {"SERVE_OPTIONS": OPTIONS, "TSQP_PORT": "0", "TSQP_METRICS_PORT": "0"}


@pytest.fixture
def places() -> Iterator[Path]:
    """Short, because of a socket; open to both users."""
    directory = Path(tempfile.mkdtemp(prefix="tsqp-d", dir="/tmp"))
    make_places(directory)
    yield directory
    remove_tree(directory)


def readable(model: Path, copy: Path) -> Path:
    """A copy of a model that both users can read."""
    shutil.copytree(model, copy)
    copy.chmod(0o755)
    for file in copy.iterdir():
        file.chmod(0o644)
    return copy


def status_of(pid: int) -> dict[str, str]:
    """What the kernel says of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def ready(process: subprocess.Popen[str]) -> str:
    """The address in the log of a server."""
    assert process.stderr is not None
    seen = []
    for text in process.stderr:
        seen.append(text)  # a library may say something too, and not in JSON
        if text.startswith("{") and (line := json.loads(text))["event"] == "ready":
            return str(line["message"]).split(": ", 1)[1].partition("/v1,")[0]
    raise AssertionError("".join(seen))


def heard(process: subprocess.Popen[str], words: str) -> None:
    """Read its log up to a line with these words."""
    assert process.stderr is not None
    seen = []
    for text in process.stderr:
        seen.append(text)
        if words in text:
            return
    raise AssertionError("".join(seen))


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make other users' processes")
@pytest.mark.skipif(bool(MISSING), reason=f"there is no {' and no '.join(MISSING)} here")
def test_both_sides_answer_as_their_units_start_them(places: Path) -> None:
    if subprocess.run(["unshare", "--mount", "--net", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no namespaces can be made here")
    model = readable(tiny_model("llama").directory, places / "model")
    worker_environment = {**environment_of(SYSTEMD / "worker.env"), "TSQP_DTYPE": "float32"}
    worker_environment["WORKER_OPTIONS"] += " --no-compiled-calls"
    server_environment = {**environment_of(SYSTEMD / "server.env"), **QUICK}
    with started(SYSTEMD / "tsqp-worker.service", worker_environment, places, model) as worker:
        heard(worker, "listening on shm:///run/tsqp-worker/worker.sock\n")
        heard(worker, "tsqp worker: read 1 file of ")
        with started(SYSTEMD / "tsqp-server.service", server_environment, places, model) as server:
            address = ready(server)
            body = {"model": "llama", "prompt": "hello", "max_tokens": 4, "temperature": 0}
            answer = httpx.post(f"{address}/v1/completions", json=body, timeout=LIMIT_S)
            assert answer.status_code == 200, answer.text
            for process, user in ((server, "tsqp"), (worker, "tsqp-worker")):
                status = status_of(process.pid)
                assert set(status["Uid"].split()) == {str(USERS[user])}
                assert status["NoNewPrivs"] == "1"
                assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
            network = Path(f"/proc/{worker.pid}/net/dev").read_text().splitlines()[2:]
            assert [line.split(":")[0].strip() for line in network] == ["lo"]
            server.send_signal(signal.SIGTERM)
            assert server.wait(LIMIT_S) == 0
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(LIMIT_S) == 0
    assert list((places / "run" / "tsqp-worker").iterdir()) == []
