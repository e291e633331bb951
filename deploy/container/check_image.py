"""Whether an image is of one side alone, and starts: the last step of each build, with the image's own Python.

    /opt/tsqp/bin/python -I check_image.py server|worker|cluster

Ends with one line and exit code 1 where a folder of the other side is there, the installed list of files names one, the
side's own code is missing or does not answer to ``--help``, or the process is root. An image for a cluster has the
folders of both sides; there a program that KubeRay calls must not be missing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import files
from importlib.util import find_spec
from pathlib import Path
from shutil import which

START = {"server": ("tsqp", "serve"), "worker": ("tsqp.untrusted",), "cluster": ("tsqp", "cluster", "status")}
NOT_THERE = {
    "server": {"untrusted", "cluster"},
    "worker": {"trusted", "tee", "server", "client", "api", "cli", "cluster", "launch"},
    "cluster": set[str](),
}
CALLED = {"cluster": ("bash", "ray", "tsqp")}


def faults(side: str) -> list[str]:
    """What is wrong with the installation that this Python finds."""
    spec = find_spec("tsqp")
    if spec is None or spec.origin is None:
        return ["tsqp is not installed"]
    found = {path.name for path in Path(spec.origin).parent.iterdir()}
    listed = {path.parts[1] for path in files("tsqp") or () if path.parts[0] == "tsqp" and len(path.parts) > 1}
    wrong = [f"tsqp/{name} is there" for name in sorted(NOT_THERE[side] & found)]
    wrong += [f"tsqp/{name} is listed as installed" for name in sorted(NOT_THERE[side] & (listed - found))]
    wrong += [f"no {name} is on the path" for name in CALLED.get(side, ()) if which(name) is None]
    module, *words = START[side]
    command = [sys.executable, "-P", "-m", module, *words, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        wrong.append(f"it does not start: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    if os.geteuid() == 0:
        wrong.append("it would run as root")
    return wrong


def main() -> None:
    (side,) = sys.argv[1:]
    if wrong := faults(side):
        raise SystemExit(f"this is no image of the {side}: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
