"""Starts a Ray for one cluster, on loopback and with a token, and looks whether somebody else's Ray asks for one.

Covers: Ray listens on loopback alone and refuses who has no token (test_cluster.py); it gets the environment listed
here and nothing else of this process's. Does not cover: processes of this user, which can read the token.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from tsqp.cluster.processes import MARK
from tsqp.cluster.state import ClusterDirectory, replace_private
from tsqp.errors import ClusterError, OptionError
from tsqp.launch.local import worker_environment
from tsqp.private_path import private_directory
from tsqp.wire.printable import printable

HEAD_COMMAND = (sys.executable, "-P", "-m", "tsqp.cluster.head")
START_LIMIT_S = 300.0  # it takes some seconds for each node
PROBE_LIMIT_S = 30.0
# Asks Ray for its nodes without a token.
PROBE = (
    "import sys, ray; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10)"
)
REFUSED = "uthentication"  # a word of Ray's refusal


def check_installed() -> None:
    """Raises OptionError where Ray is not installed."""
    if find_spec("ray") is None:
        raise OptionError("tsqp cluster places workers by Ray: pip install 'tsqp[cluster]'")


def access(token: Path, *, own: bool) -> dict[str, str]:
    """The variables by which a process shows Ray the token, and is silent to its maker."""
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    # Else Ray takes the machine's own address in place of 127.0.0.1, as it does where it is meant for many machines.
    return variables | ({"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"} if own else {})


def start_ray(directory: ClusterDirectory, ray_path: Path, nodes: int) -> str:
    """Host and port of a new Ray, which outlives this process. Raises ClusterError, PathRefused."""
    replace_private(directory.token, secrets.token_hex(32).encode())
    ray_path = private_directory(ray_path, "set TMPDIR to another directory")
    inner = ray_path / "ray"  # the name that Ray looks for below RAY_TMPDIR; Ray opens it to all, so it lies in ours
    inner.mkdir(exist_ok=True)
    environment = {
        **worker_environment(),
        **access(directory.token, own=True),
        MARK: str(directory.path),
        "RAY_TMPDIR": str(ray_path),
        "SPT_NOENV": "1",  # titles of processes leave the mark
        "RAY_prestart_worker_first_driver": "0",  # a process of Python for each CPU that it counts
        "RAY_worker_niceness": "0",  # Ray's own choice is 15: the workers that actors start are the point of it all
        "RAY_health_check_period_ms": "1000",  # a lost node is noticed in some 3 s; Ray's own choice is 15
        "RAY_health_check_failure_threshold": "3",
    }
    with directory.log.open("wb") as log:
        process = subprocess.Popen(
            [*HEAD_COMMAND, str(inner), str(nodes)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    if process.stdout is None:
        raise ClusterError("Ray was started without a pipe")
    with process.stdout:
        said = select.poll()
        said.register(process.stdout, select.POLLIN)
        in_time = bool(said.poll(START_LIMIT_S * 1000))  # whoever starts it has the cluster's lock
        line = process.stdout.readline(4096) if in_time else b""
    try:
        return str(json.loads(line)["address"])
    except (ValueError, KeyError, TypeError):
        process.kill()
        process.wait()
        within = "" if in_time else f" within {START_LIMIT_S:.0f} s"
        raise ClusterError(f"Ray did not start{within}: {_last_line(directory.log)}") from None


def check_asks_for_token(address: str, token: Path) -> None:
    """Somebody else's Ray: that it is there, and refuses who has no token. Raises ClusterError, OptionError."""
    if not token.is_file():
        raise OptionError(f"--token {token}: there is no such file")
    with_token = _probe(address, access(token, own=False))
    if with_token:
        raise ClusterError(f"no Ray answers at {address}, or it has another token: {with_token}")
    if REFUSED not in _probe(address, {"RAY_AUTH_MODE": "disabled"}):
        raise ClusterError(
            f"the Ray at {address} lets everybody in who reaches its ports: start it with RAY_AUTH_MODE=token"
        )


def _probe(address: str, variables: dict[str, str]) -> str:
    """Nothing where Ray says which nodes it has, else the last line of the error."""
    command = [sys.executable, "-P", "-c", PROBE, address]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    try:
        done = subprocess.run(
            command, env={**environment, **variables}, capture_output=True, timeout=PROBE_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return "it is silent"
    return "" if done.returncode == 0 else _last(done.stderr.decode(errors="replace"))


def _last_line(log: Path) -> str:
    return _last(log.read_text(encoding="utf-8", errors="replace"))


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return printable(lines[-1])[:300] if lines else "it said nothing"
