"""Whether compiled kernels are kept on disk, and where. They are code that the trusted side loads."""

from __future__ import annotations

import os
from pathlib import Path

from tsqp.checkpoint.cache import cache_directory
from tsqp.errors import RuntimeDirectoryError
from tsqp.tee.detection import detect_tee

AUTO, OFF = "auto", "off"


def kernel_cache_directory(choice: str) -> Path | None:
    """The directory for compiled kernels, made with mode 0700 when missing; None for none.

    ``auto``: in the user's cache directory, and none in a TEE, whose disk the host can write. ``off``: none. Anything
    else is a directory that the user vouches for. Raises RuntimeDirectoryError for one that others can write.
    """
    if choice == OFF or (choice == AUTO and detect_tee() is not None):
        return None
    directory = cache_directory() / "kernels" if choice == AUTO else Path(choice)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = directory.stat()
    except OSError as error:
        if choice == AUTO:
            return None  # a cache that cannot be written saves nothing and costs nothing
        raise RuntimeDirectoryError(f"cannot use {directory} for compiled kernels: {error.strerror}") from None
    if info.st_uid != os.geteuid() or info.st_mode & 0o022:
        raise RuntimeDirectoryError(
            f"others can write to {directory}, which holds code that is run here: chmod 700 it, or --kernel-cache off"
        )
    return directory
