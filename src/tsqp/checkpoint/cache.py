"""Where downloads and compiled code are kept."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from tsqp.errors import PathRefused
from tsqp.private_path import private_directory

OTHER_CACHE = "set TSQP_CACHE to another directory"


def cache_directory() -> Path:
    """``TSQP_CACHE``, or this user's cache directory. Not created here."""
    chosen = os.environ.get("TSQP_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("tsqp"))


def code_directory(*names: str) -> Path | None:
    """A directory below the cache directory for code that this process loads, made with mode 0700.

    None where the system does not give one to write to: nothing is kept then. Raises PathRefused where others could
    have put code, instead of keeping none: every later start would be slow without a word, and the same people could
    exchange the weights beside it.
    """
    try:
        directory = private_directory(cache_directory().joinpath(*names), OTHER_CACHE)
    except PathRefused as refused:
        if refused.unsafe:
            raise
        return None
    return directory if os.access(directory, os.W_OK) else None
