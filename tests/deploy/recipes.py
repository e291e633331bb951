"""The recipes of the images, as tests read them."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

from tests.deploy.unit_files import DEPLOY

CONTAINER = DEPLOY / "container"
SOURCE = DEPLOY.parent / "src" / "tsqp"


def recipe(side: str) -> str:
    """One side's, with continued lines joined."""
    return (CONTAINER / f"{side}.Containerfile").read_text("utf-8").replace("\\\n", " ")


def stages(side: str) -> dict[str, list[tuple[str, str]]]:
    """Instructions and what follows them, by stage; the one that is kept is "final"."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for line in recipe(side).splitlines():
        if match := re.fullmatch(r"FROM \S+(?: AS (\S+))?", line):
            name = match[1] or "final"
        elif match := re.fullmatch(r"([A-Z]+) (.*)", line):
            found.setdefault(name, []).append((match[1], match[2]))
    return found


def of(side: str, stage: str, instruction: str) -> list[str]:
    return [rest for one, rest in stages(side)[stage] if one == instruction]


def removed(side: str) -> set[str]:
    """What the recipe takes out of the package before it is made into a wheel."""
    commands = [rest for rest in of(side, "build", "RUN") if rest.startswith("rm -r ")]
    return {Path(word).name for command in commands for word in shlex.split(command)[2:]}


def package_of(side: str, directory: Path) -> Path:
    """A copy of the package as the image of one side has it, in a directory to be put on the path."""
    shutil.copytree(SOURCE, directory / "tsqp", ignore=shutil.ignore_patterns("__pycache__"))
    for name in removed(side):
        path = directory / "tsqp" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return directory
