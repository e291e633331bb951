"""What `make gpu-check` needs on a machine that has a GPU and torch, and no network: wheels that travel with the tree.

    make gpu-bundle      (or: python -m scripts.gpu_bundle [--have NAME ...] [--output DIR])

The machine is expected to have Python 3.12 on x86_64 with torch's CUDA build, triton, numpy and numba, and what those
depend on (HAVE; `--have` adds names, which keeps the bundle small). Everything else of a run, of the GPU's tests and of
the peer is downloaded by the hashes of requirements/dev.lock. A wheel of tsqp is there for its name and version alone:
the code that runs is the tree's. Prints what to carry and the one command to run there. Fails where tree and wheels are
over 60 MiB.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tsqp.bench import tree

ROOT = Path(__file__).parents[1]
OUTPUT = Path(".gpu-wheels")
MOST_BYTES = 60 << 20
MOST_COMMAND = 2_000  # characters

# What torch's CUDA build and numba bring, with what they need.
HAVE = (
    *("torch", "triton", "numpy", "numba", "llvmlite", "filelock", "fsspec", "jinja2", "markupsafe", "mpmath"),
    *("networkx", "setuptools", "sympy", "typing-extensions"),
)
# Of dev.lock: what tests/gpu and its fixtures load, and the peer of the benchmarks, with what they need.
TESTED_WITH = (
    *("pytest", "pytest-timeout", "hypothesis", "iniconfig", "pluggy", "pygments", "sortedcontainers", "packaging"),
    *("transformers", "accelerate", "annotated-doc", "psutil", "regex", "shellingham", "typer"),
)

PYTHON = "3.12"
THERE = {  # as environment markers see it
    "python_version": PYTHON,
    "python_full_version": f"{PYTHON}.0",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "platform_machine": "x86_64",
    "platform_system": "Linux",
    "sys_platform": "linux",
    "os_name": "posix",
}
# pip takes no range: the tags of wheels that glibc 2.39 (Ubuntu 24.04) runs.
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)),
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)

SITE = "/tmp/tsqp-site"
CACHE = "/tmp/tsqp-cache"  # the home may be one in which others can write, where no code would be kept


def wanted(run: str, dev: str, have: Iterable[str]) -> str:
    """The entries of dev.lock, hashes and all, that the machine lacks, from the texts of both locks."""
    named = {canonicalize_name(name) for name in (*blocks(run), *TESTED_WITH)}
    named -= {canonicalize_name(name) for name in (*HAVE, *have)}
    every = blocks(dev)
    missing = sorted(named - every.keys())
    if missing:
        raise SystemExit(f"not in dev.lock: {', '.join(missing)}")
    return "".join(every[name] for name in sorted(named) if applies(every[name]))


def blocks(lock: str) -> dict[str, str]:
    """A lock's entries by canonical name: a requirement and the lines of its hashes."""
    found = {}
    for block in re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE)[1:]:
        found[str(canonicalize_name(_requirement(block).name))] = block
    return found


def applies(block: str) -> bool:
    """Whether an entry's marker holds on the machine."""
    marker = _requirement(block).marker
    return marker is None or marker.evaluate(dict(THERE))


def _requirement(block: str) -> Requirement:
    return Requirement(block.partition("\n")[0].removesuffix("\\").strip())


def download(requirements: str, output: Path) -> None:
    """The wheels of these requirements for that machine, by their hashes, from the index that pip knows."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write(requirements)
        file.flush()
        there = ["--python-version", PYTHON, "--implementation", "cp", "--only-binary", ":all:"]
        there += [f"--platform={name}" for name in PLATFORMS]
        _pip("download", "--no-deps", "--require-hashes", *there, "--dest", str(output), "--requirement", file.name)


def own_wheel(output: Path) -> None:
    """tsqp's, made here by the locked build backend."""
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(output), str(ROOT))


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


def tree_bytes(root: Path) -> int:
    """Of the files that travel: tracked, and those that git does not ignore."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return sum(path.stat().st_size for path in (root / name for name in names if name) if path.is_file())


def command(output: Path, commit: str) -> str:
    """What to run there, in the root of the tree. Results go to ``OUT``, or into the tree where that is not set."""
    return (
        "python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade"
        f" --target {SITE} {output}/*.whl"
        f" && install -d -m 700 {CACHE}"
        f' && export PYTHONPATH="$PWD/src:$PWD:{SITE}" TSQP_CACHE={CACHE} TSQP_COMMIT={commit}'
        f' && python3 -m benchmarks.gpu_check --output "${{OUT:-benchmarks/results}}"'
    )


def report(output: Path, root: Path, commit: str) -> str:
    """Sizes, what to carry, and the command. Raises SystemExit where that is more than may travel."""
    wheels = sorted((path.stat().st_size, path.name) for path in output.glob("*.whl"))
    wheel_bytes, rest = sum(size for size, _ in wheels), tree_bytes(root)
    if wheel_bytes + rest > MOST_BYTES:
        largest = ", ".join(f"{name} ({size / 2**20:.1f} MiB)" for size, name in wheels[:-4:-1])
        raise SystemExit(
            f"{(wheel_bytes + rest) / 2**20:.1f} MiB of {MOST_BYTES >> 20} that may travel; the largest: {largest}. "
            "--have names what the machine has"
        )
    line = command(output, commit)
    if len(line) > MOST_COMMAND:
        raise SystemExit(f"the command has {len(line)} characters; the limit is {MOST_COMMAND}")
    return (
        f"{len(wheels)} wheels of {wheel_bytes / 2**20:.1f} MiB beside {rest / 2**20:.1f} MiB of the tree.\n"
        f"Carry: {output}\nRun there, in the root of the tree:\n\n{line}\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu_bundle")
    parser.add_argument("--have", action="append", default=[], metavar="NAME", help="a package that is there; again")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where wheels go, below the tree's root")
    options = parser.parse_args(arguments)
    output = ROOT / options.output
    output.mkdir(parents=True, exist_ok=True)
    for old in output.glob("*.whl"):
        old.unlink()  # two versions of one package would not install
    run, dev = ((ROOT / "requirements" / f"{name}.lock").read_text(encoding="utf-8") for name in ("run", "dev"))
    download(wanted(run, dev, options.have), output)
    own_wheel(output)
    print(report(options.output, ROOT, tree.commit()), end="")


if __name__ == "__main__":
    main()
