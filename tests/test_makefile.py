"""What the Makefile does where something does not go well."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"
WITHOUT_PIP = """#!/bin/sh
[ "$1" = -c ] && exit 0  # it is new enough
mkdir -p "$3/bin" && touch "$3/bin/python" && echo "ensurepip is not available" >&2 && exit 1
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize("directory", [".venv", ".venv-conformance", ".venv-latest", ".venv-sbom"])
def test_an_environment_that_was_half_made_is_not_believed_to_be_there(directory: str, tmp_path: Path) -> None:
    """Debian without its package python3-venv makes an interpreter, then fails: the next try would have no pip."""
    python = tmp_path / "python"
    python.write_text(WITHOUT_PIP)
    python.chmod(0o755)
    command = ["make", "--file", str(MAKEFILE), f"PYTHON={python}", f"{directory}/bin/python"]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "ensurepip is not available" in done.stderr
        assert not (tmp_path / directory).exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_a_python_that_is_too_old_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    python = tmp_path / "python3.10"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 1\ntouch made\n')
    python.chmod(0o755)
    command = ["make", "--file", str(MAKEFILE), f"PYTHON={python}", ".venv/bin/python"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"{python} is not Python 3.11 or later: name one that is, as in make PYTHON=python3.12\n" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["python3.10"]
