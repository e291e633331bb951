"""What ``--compile`` needs of a machine: a compiler."""

from __future__ import annotations

import importlib.util
import os
import shutil

from tsqp.errors import OptionError


def check_compiler(device: str) -> None:
    """Raises OptionError where torch.compile would find no compiler: ``CXX``, or g++; on CUDA also triton."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise OptionError(f"--compile needs a C++ compiler, and there is no {name} in PATH")
    if device.startswith("cuda") and importlib.util.find_spec("triton") is None:
        raise OptionError("--compile on CUDA needs triton: install it, or leave --compile out")
