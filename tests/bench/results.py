"""What a benchmark must have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TINY = "synthetic:tiny"
QUICK = ("--threads", "1", "--runs", "1", "--json")
PNG = b"\x89PNG\r\n\x1a\n"


def is_measured(result: dict[str, Any]) -> bool:
    """What every object has: where, with what, and how fast this machine can be."""
    machine = {"cpu", "cores", "python", "torch", "tsqp", "commit", "date"}
    return machine <= result["machine"].keys() and bool(result["ceilings"])


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(PNG) and path.stat().st_size > 5_000
