"""What systemd-analyze says of a unit, for tests."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

MOST_EXPOSED = 3.0
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="no systemd-analyze here: install the package systemd"
)


def analyzed(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"})


def exposure(unit: object) -> float:
    """From 0, the best, to 10."""
    report = analyzed("security", "--offline=true", "--no-pager", unit)
    (level,) = re.findall(r"Overall exposure level for \S+: ([\d.]+)", report.stdout)
    return float(level)
