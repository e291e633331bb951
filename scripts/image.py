"""Builds the images of both sides, and that of a cluster's nodes, with the container engine that is here.

    make image BASE=docker.io/library/python@sha256:… [TORCH_INDEX=URL]      (or: python scripts/image.py BASE …)

BASE is named by its digest: a tag would be another image tomorrow. The first of podman, docker and buildah that answers
builds. What is missing is one line, and exit code 1.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTAINER = Path("deploy/container")
SIDES = ("server", "worker", "cluster")
ENGINES = ("podman", "docker", "buildah")
BY_DIGEST = re.compile(r"[^\s@]+@sha256:[0-9a-f]{64}")


def engine() -> str:
    """The first engine that answers. Raises SystemExit with why there is none: a docker without its daemon is none."""
    reasons = []
    for name in ENGINES:
        if shutil.which(name) is None:
            reasons.append(f"no {name}")
        elif subprocess.run([name, "info"], capture_output=True, check=False).returncode:
            reasons.append(f"{name} does not answer to `{name} info`")
        else:
            return name
    raise SystemExit(f"no images: a container engine is missing ({', '.join(reasons)})")


def command(engine: str, side: str, base: str, torch_index: str) -> list[str]:
    """What builds one image, in the root of the repository."""
    arguments = [f"--build-arg=BASE={base}"]
    if torch_index:
        arguments.append(f"--build-arg=TORCH_INDEX={torch_index}")
    file = CONTAINER / f"{side}.Containerfile"
    return [engine, "build", *arguments, "--file", str(file), "--tag", f"tsqp-{side}", "."]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python scripts/image.py")
    parser.add_argument("base", help="an image with Python 3.11 or later, as NAME@sha256:DIGEST")
    parser.add_argument("--torch-index", default="", help="a further index for torch")
    options = parser.parse_args(arguments)
    if not BY_DIGEST.fullmatch(options.base):
        raise SystemExit(f"no images: BASE is {options.base!r}, not NAME@sha256:DIGEST of an image with Python")
    found = engine()
    for side in SIDES:
        subprocess.run(command(found, side, options.base, options.torch_index), cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
