"""Which warnings fail a test: ours, and never one of somebody else's package (filterwarnings in pyproject.toml)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.commands import LIMIT_S

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


class Outcome(NamedTuple):
    """What became of one statement: whether its test passed, and whether a warning of it is shown."""

    passed: bool
    shown: bool


class Outcomes(NamedTuple):
    """What pytest printed, and what became of each statement."""

    printed: str
    of: dict[str, Outcome]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """One test for each statement, all in one run under the configuration of this repository."""
    directory = tmp_path_factory.mktemp("warnings")
    statements = {**SOMEBODY_ELSES, **OURS}
    tests = "".join(f"def test_{n}():\n    {statement}\n" for n, statement in enumerate(statements.values()))
    (directory / "library.py").write_text("import warnings\ndef warn(kind): warnings.warn('old', kind, stacklevel=2)\n")
    (directory / "test_all.py").write_text(
        f"import threading, warnings, library\nfrom tsqp.errors import TsqpWarning\n{tests}"
    )
    options = ("-v", "-c", PYPROJECT, "--rootdir", directory, "-p", "no:cacheprovider", directory / "test_all.py")
    command = [sys.executable, "-m", "pytest", *map(str, options)]
    printed = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, check=False, timeout=LIMIT_S
    ).stdout
    passed = set(re.findall(r"::test_(\d+) PASSED", printed))
    shown = set(re.findall(r"^test_all\.py::test_(\d+)$", printed, re.MULTILINE))  # in the summary of warnings
    return Outcomes(printed, {name: Outcome(str(n) in passed, str(n) in shown) for n, name in enumerate(statements)})


@pytest.mark.parametrize("name", SOMEBODY_ELSES)
def test_a_warning_of_somebody_else_is_shown_and_fails_nothing(name: str, outcomes: Outcomes) -> None:
    assert outcomes.of[name] == Outcome(passed=True, shown=True), outcomes.printed


@pytest.mark.parametrize("name", OURS)
def test_a_warning_of_ours_fails(name: str, outcomes: Outcomes) -> None:
    assert not outcomes.of[name].passed, outcomes.printed
    assert f"{len(OURS)} failed, {len(SOMEBODY_ELSES)} passed" in outcomes.printed


def test_the_seed_of_the_order_is_said(outcomes: Outcomes) -> None:
    assert "--randomly-seed=" in outcomes.printed
