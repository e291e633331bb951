"""What several commands take: ``--json``, a moment, files."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tsqp.errors import InputError

Json = Annotated[bool, Parameter(name="--json", help="Print one JSON object.")]
JsonLine = Annotated[bool, Parameter(name="--json", help="Print one JSON object as the last line.")]
Collateral = Annotated[
    str | None, Parameter(help="Certificates and TCB info: a directory, or the https:// address of a service.")
]


def unix_time(at: datetime | None = None) -> float:
    """Now, or a moment that is of UTC where it says nothing else."""
    if at is None:
        return time.time()
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def read_bytes(path: Path | str, most: int, remedy: str = "") -> bytes:
    """A file, or standard input for ``-``: at most ``most`` bytes and one more, which says that there are too many.

    Raises InputError, which ends in ``remedy``.
    """
    if str(path) == "-":
        return sys.stdin.buffer.read(most + 1)
    try:
        with Path(path).open("rb") as file:
            return file.read(most + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}{remedy}") from None


def read_text(path: Path, flag: str) -> str:
    """A file of UTF-8. Raises InputError, with the ``flag`` that named the file."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{flag}: cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{flag}: {path} is not UTF-8 text") from None
