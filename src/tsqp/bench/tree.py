"""The source tree that a result was measured from: results are kept only where a commit names the code."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tsqp.errors import OptionError

UNKNOWN, DIRTY = "unknown", "-dirty"
# A run of many benchmarks writes its first results before it measures the next: results are not code.
NOT_CODE = "benchmarks/results"


def commit(source: Path = Path(__file__)) -> str:
    """The commit of the checkout that tracks ``source``.

    The name ends with ``-dirty`` where a file was changed, added or removed since, results and ignored files apart. The
    name is "unknown" outside of a checkout: an installed package in somebody else's repository is not of its commit.
    """
    name = _git(source, "rev-parse", "--short", "HEAD")
    tracked = _git(source, "ls-files", "--error-unmatch", source.name)
    changes = _git(
        source, "status", "--porcelain", "--untracked-files=normal", "--", ":(top)", f":(top,exclude){NOT_CODE}"
    )
    if name is None or tracked is None or changes is None:
        return UNKNOWN
    return name + DIRTY if changes else name


def check_tree(*, dirty_ok: bool) -> None:
    """Raises OptionError where no commit names the code: nobody could measure the result again.

    ``dirty_ok`` allows changes, which the result then says; no option allows a result without any commit.
    """
    name = commit()
    if name == UNKNOWN:
        raise OptionError(
            "results are kept where a commit names what was measured, and the tsqp that runs is not that of a git "
            "checkout: use the one that make installs there (benchmarks but for all also run without --results)"
        )
    if name.endswith(DIRTY) and not dirty_ok:
        raise OptionError(
            f"--results: files were changed since commit {name.removesuffix(DIRTY)}; commit them first, "
            "or give --dirty-ok for a result that the README does not take"
        )


def _git(source: Path, *arguments: str) -> str | None:
    """What git says about the folder of ``source``; None where it fails or is not installed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # as in a hook
    command = ["git", "-C", str(source.parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
