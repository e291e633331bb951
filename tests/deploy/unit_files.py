"""The files under deploy/, as tests read them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
COMMAND = "/opt/tsqp/bin/tsqp"  # where docs/operations.md installs it

Settings = dict[str, list[str]]


def settings_of(path: Path) -> Settings:
    """What a unit or an environment file sets: each name with its values, in their order."""
    found: Settings = {}
    for line in path.read_text("utf-8").splitlines():
        if match := re.fullmatch(r"(\w+)=(.*)", line):
            found.setdefault(match[1], []).append(match[2])
    return found


def environment_of(path: Path) -> dict[str, str]:
    """What an environment file sets."""
    return {name: values[-1] for name, values in settings_of(path).items()}


def arguments_of(unit: Path, environment: dict[str, str]) -> list[str]:
    """The command line of a unit, after the command, with variables put in as systemd does: word by word."""
    (line,) = settings_of(unit)["ExecStart"]
    command, *words = line.split()
    assert command == COMMAND
    found: list[str] = []
    for word in words:
        found += shlex.split(environment.get(word[1:], "")) if word.startswith("$") else [word]
    return found
