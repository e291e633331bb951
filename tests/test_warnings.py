"""Which warnings fail a test: ours, and never one of somebody else's package (filterwarnings in pyproject.toml)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
NUMPY_SAYS = "overflow encountered in multiply"

SOMEBODY_ELSES = {
    "of its own module": "warnings.warn('renamed', FutureWarning, stacklevel=1)",
    # What transformers 5.24 did: the library names its caller, here the test module.
    "attributed to a test": "library.warn(FutureWarning)",
    "DeprecationWarning attributed to a test": "library.warn(DeprecationWarning)",
    "attributed to us": "warnings.warn_explicit('renamed', FutureWarning, 'x.py', 1, module='tsqp.engine')",
    "a RuntimeWarning attributed to us": "warnings.warn_explicit('slow', RuntimeWarning, 'x.py', 1, module='tsqp.x')",
    "arithmetic elsewhere": f"warnings.warn_explicit('{NUMPY_SAYS}', RuntimeWarning, 'x.py', 1, module='matplotlib.x')",
}
OURS = {
    "our category": "warnings.warn('ours', TsqpWarning)",
    "our arithmetic": f"warnings.warn_explicit('{NUMPY_SAYS}', RuntimeWarning, 'x.py', 1, module='tsqp.arith.field')",
    "a file never closed": "open(__file__)",
    "an exception in a thread": "thread = threading.Thread(target=lambda: 1 / 0); thread.start(); thread.join()",
}


def outcome(statement: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """One test with one statement, under the configuration of this repository."""
    (directory / "library.py").write_text("import warnings\ndef warn(kind): warnings.warn('old', kind, stacklevel=2)\n")
    (directory / "test_one.py").write_text(
        f"import threading, warnings, library\nfrom tsqp.errors import TsqpWarning\ndef test_one():\n    {statement}\n"
    )
    options = ("-c", PYPROJECT, "--rootdir", directory, "-p", "no:cacheprovider", directory / "test_one.py")
    command = [sys.executable, "-m", "pytest", *map(str, options)]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=100)


@pytest.mark.parametrize("statement", SOMEBODY_ELSES.values(), ids=SOMEBODY_ELSES)
def test_a_warning_of_somebody_else_is_shown_and_fails_nothing(statement: str, tmp_path: Path) -> None:
    done = outcome(statement, tmp_path)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 1 warning" in done.stdout


@pytest.mark.parametrize("statement", OURS.values(), ids=OURS)
def test_a_warning_of_ours_fails(statement: str, tmp_path: Path) -> None:
    done = outcome(statement, tmp_path)
    assert done.returncode == 1, done.stdout
    assert "1 failed" in done.stdout


def test_the_seed_of_the_order_is_said(tmp_path: Path) -> None:
    assert "--randomly-seed=" in outcome("pass", tmp_path).stdout
