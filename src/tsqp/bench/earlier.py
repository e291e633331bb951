"""Results of several cases in one file, of which some are measured again: each case says of which commit it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tsqp.errors import OptionError


def check_goes_together(path: Path, cpu: str, threads: int) -> None:
    """Raises OptionError where the file's cases were measured on another processor or with other threads."""
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        other_cpu, other_threads = earlier["machine"]["cpu"], earlier["threads"]
        if (other_cpu, other_threads) != (cpu, threads):
            raise OptionError(
                f"--results: {path} was measured on {other_cpu} with {other_threads} threads, this is {cpu} with "
                f"{threads}: measure all, or name another directory"
            )


def with_earlier(result: dict[str, Any], path: Path, order: Sequence[str]) -> dict[str, Any]:
    """The result, and those cases of the file that were not measured again, by ``order`` of their names."""
    if not path.exists():
        return result
    earlier = json.loads(path.read_text(encoding="utf-8"))["cases"]
    cases = {case["name"]: case for case in (*earlier, *result["cases"])}
    return {**result, "cases": [cases[name] for name in order if name in cases]}
