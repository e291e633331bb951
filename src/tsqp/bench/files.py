"""Results in files, one each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsqp.errors import OptionError

if TYPE_CHECKING:
    from rich.console import Console


def check_directory(directory: Path) -> None:
    """Raises OptionError for one that is not there."""
    if not directory.is_dir():
        raise OptionError(f"--results: {directory} is not a directory")


def file_name(model: str) -> str:
    """A model's part of a file's name."""
    return model.removeprefix("synthetic:").rstrip("/").rpartition("/")[2]


def save(result: dict[str, Any], directory: Path, name: str, console: Console) -> None:
    """Write ``name``.json and say so. Raises OSError."""
    path = directory / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(f"written to {path}", highlight=False, soft_wrap=True)
