"""A JSON object from a file, or one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tsqp.errors import CorruptCheckpoint


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that a file holds. Raises CorruptCheckpoint naming the file when it does not hold one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise CorruptCheckpoint(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value
