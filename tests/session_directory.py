"""One directory for what outlives a test, such as tiny models. It is removed when the process that made it ends."""

from __future__ import annotations

import atexit
import os
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp


@cache
def session_directory() -> Path:
    """The directory of this process and of those that it starts."""
    directory = Path(mkdtemp(prefix="tsqp-s"))  # short: socket paths are limited to 107 bytes
    atexit.register(_remove, directory, os.getpid())
    return directory


def _remove(directory: Path, maker: int) -> None:
    if os.getpid() == maker:  # not a fork of it
        shutil.rmtree(directory, ignore_errors=True)
