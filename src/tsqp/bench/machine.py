"""Where and with what a result was measured."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tsqp.bench import tree
from tsqp.cores import cores


def machine() -> dict[str, str | int]:
    """Processor, cores this process may use, versions, commit of the source tree (``-dirty``: changed since), day."""
    return {
        "cpu": f"{_processor()}, {cores()} cores",
        "cores": cores(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version_of("transformers"),
        "tsqp": version("tsqp"),
        "commit": tree.commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown processor"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def version_of(package: str) -> str:
    """Of a package that may be missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
