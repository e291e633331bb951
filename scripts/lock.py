"""Writes dev.lock, run.lock and cluster.lock of requirements/, with hashes, from pyproject.toml and constraints.txt.

    make lock            (or: python scripts/lock.py UV, where UV is the path of a `uv` executable)

Every package moves to its newest release that fits. dev.lock is resolved first; run.lock, what a run needs, and
cluster.lock, the same with Ray, are resolved under the versions of dev.lock, so there is one resolution. torch is in
the resolution and in no file, like the packages of its CUDA build: a machine chooses its build, so constraints.txt
names the version and pip finds the build. The other packages that torch needs (sympy, networkx, ...) are locked like
the rest, and so is the build backend. So is triton in dev.lock, because the tests interpret its
kernels: one resolution makes that the version which torch's CUDA build pins.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEV, RUN, CLUSTER = (f"requirements/{name}.lock" for name in ("dev", "run", "cluster"))
HEADER = "# Made by `make lock`. Install with --require-hashes --no-deps; torch is in constraints.txt.\n"
OF_THE_BUILD = re.compile(r"torch|triton|nvidia-.*|cuda-.*")  # what differs between torch's CPU and CUDA builds


def main() -> None:
    """Resolve four times: for the names, and for each file."""
    (uv,) = sys.argv[1:]
    resolved = compiled(uv, "--extra", "dev", "--no-annotate")
    names = [line.partition("==")[0] for line in resolved.splitlines() if "==" in line]
    left_out = [f"--no-emit-package={name}" for name in names if OF_THE_BUILD.fullmatch(name)]
    if "--no-emit-package=torch" not in left_out:
        raise SystemExit("torch is not in the resolution: constraints.txt and this script disagree")
    locked = (*left_out, "--generate-hashes")
    tested = [option for option in locked if option != "--no-emit-package=triton"]
    (ROOT / DEV).write_text(HEADER + compiled(uv, "--extra", "dev", *tested), encoding="utf-8")
    under = ("--constraints", DEV, *locked, "--no-annotate")
    (ROOT / RUN).write_text(HEADER + compiled(uv, *under), encoding="utf-8")
    (ROOT / CLUSTER).write_text(HEADER + compiled(uv, "--extra", "cluster", *under), encoding="utf-8")


def compiled(uv: str, *options: str) -> str:
    """What uv resolves for every machine and every Python that pyproject.toml allows.

    Wheels only: a source package would run its author's build, with whatever that build fetches. One version for all
    Pythons where one exists, so that what was tested on one is what the others install.
    """
    build_system = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    always = (
        *("--universal", "--fork-strategy", "fewest", "--only-binary", ":all:", "--constraints", "constraints.txt"),
        *("--no-header", "--no-emit-index-url", "--no-emit-find-links", "--annotation-style", "line", "--quiet"),
    )
    done = subprocess.run(
        [uv, "pip", "compile", "pyproject.toml", "-", *always, *options],
        cwd=ROOT,
        input="\n".join(build_system),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


if __name__ == "__main__":
    main()
