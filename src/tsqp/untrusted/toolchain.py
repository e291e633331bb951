"""What ``--compile`` needs of a machine: a compiler, and a directory for code that this user alone can write."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
from pathlib import Path

from tsqp.checkpoint.cache import cache_directory
from tsqp.errors import OptionError


def check_compiler(device: str) -> None:
    """Raises OptionError where torch.compile would find no compiler: ``CXX``, or g++; on CUDA also triton."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise OptionError(f"--compile needs a C++ compiler, and there is no {name} in PATH")
    if device.startswith("cuda") and importlib.util.find_spec("triton") is None:
        raise OptionError("--compile on CUDA needs triton: install it, or leave --compile out")


def code_directory() -> Path:
    """Where compiled code is kept. Made with mode 0700; raises OptionError unless it belongs to this user alone."""
    directory = cache_directory() / "compiled-worker"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise OptionError(f"--compile needs a directory for its code: {directory}: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise OptionError(f"{directory} holds code that --compile loads, and others can write there: remove it")
    return directory
