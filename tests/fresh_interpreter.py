"""What a fresh interpreter loads."""

from __future__ import annotations

import subprocess
import sys
from functools import cache


@cache
def modules_after(statement: str) -> frozenset[str]:
    """The names in ``sys.modules`` of a fresh interpreter after ``statement``: one interpreter for each statement."""
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return frozenset(run.stdout.split())


def loaded(modules: frozenset[str], prefix: str) -> set[str]:
    return {name for name in modules if name == prefix or name.startswith(prefix + ".")}
