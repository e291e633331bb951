"""Where downloads are kept."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_directory() -> Path:
    """``TSQP_CACHE``, or this user's cache directory. Not created here."""
    chosen = os.environ.get("TSQP_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("tsqp"))
