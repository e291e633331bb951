"""What a fresh machine installs: every dependency locked by hashes, torch by version, one resolution for all groups."""

from __future__ import annotations

import re
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCKS = ("run", "cluster", "dev")
BY_VERSION = ("torch",)  # constraints.txt
# Of torch 2.13, on Linux, its CUDA packages apart.
TORCH_NEEDS = ("filelock", "typing-extensions", "setuptools", "sympy", "networkx", "jinja2", "fsspec", "mpmath")


def text(name: str) -> str:
    return (ROOT / "requirements" / f"{name}.lock").read_text(encoding="utf-8")


def locked(name: str) -> dict[str, Requirement]:
    """Requirements of a lock by name, with their markers."""
    lines = [line.removesuffix("\\") for line in text(name).splitlines() if line and not line.startswith((" ", "#"))]
    found = [Requirement(line.strip()) for line in lines]
    assert len({requirement.name for requirement in found}) == len(found)
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def declared(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for, the build backend with it."""
    project = PROJECT["project"]
    groups = (project["optional-dependencies"][extra] for extra in extras)
    lines = chain(project["dependencies"], PROJECT["build-system"]["requires"], *groups)
    return [Requirement(line) for line in lines if not line.startswith("tsqp[")]


@pytest.mark.parametrize(
    ("lock", "extras"), [("run", ()), ("cluster", ("cluster",)), ("dev", ("verify", "cluster", "bench", "test", "dev"))]
)
def test_every_dependency_is_locked_within_its_bounds(lock: str, extras: tuple[str, ...]) -> None:
    found = locked(lock)
    for requirement in declared(*extras):
        name = canonicalize_name(requirement.name)
        if name in BY_VERSION:
            assert name not in found
            continue
        assert name in found, f"{name} is not in {lock}.lock: make lock"
        (version,) = (one.version for one in found[name].specifier)
        assert requirement.specifier.contains(version), f"{found[name]} is not {requirement}: make lock"


def test_the_groups_are_one_resolution() -> None:
    run, cluster, dev = (locked(name) for name in LOCKS)
    assert run.keys() < cluster.keys() < dev.keys()
    for part in (run, cluster):
        assert {name: part[name].specifier for name in part} == {name: dev[name].specifier for name in part}


@pytest.mark.parametrize("lock", LOCKS)
def test_everything_is_pinned_and_has_a_hash(lock: str) -> None:
    blocks = re.split(r"\n(?=[a-z0-9])", text(lock))[1:]
    assert len(blocks) == len(locked(lock))
    for block in blocks:
        assert re.match(r"[a-z0-9-]+==\S+", block), block
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block


@pytest.mark.parametrize("lock", LOCKS)
def test_torch_and_its_cuda_packages_are_the_machines(lock: str) -> None:
    names = locked(lock)
    own = r"torch$|nvidia-|cuda-" if lock == "dev" else r"torch$|triton$|nvidia-|cuda-"  # the tests interpret kernels
    assert not [name for name in names if re.match(own, name)]
    assert set(TORCH_NEEDS) <= names.keys()


def test_torch_has_one_exact_version() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line and not line.startswith("#"))
    assert re.fullmatch(r"torch==\d+\.\d+\.\d+", line)


@pytest.mark.parametrize("file", [*(f"requirements/{name}.lock" for name in LOCKS), "constraints.txt"])
def test_no_index_and_no_path_is_named(file: str) -> None:
    content = (ROOT / file).read_text(encoding="utf-8")
    assert "://" not in content
    assert not re.search(r"^\s*(--(extra-)?index|--find-links|-[if] )", content, re.MULTILINE)
