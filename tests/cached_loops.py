"""Imported before anything that has compiled loops: this process keeps them on disk, as commands do.

Compiling them takes a minute, and two test processes run at once. Not in the user's directory, from which commands load
them: a loop keeps the constants that it was compiled with, and a test may change one.
"""

from __future__ import annotations

from tsqp.arith.jit import cache_name, enable_cache
from tsqp.checkpoint.cache import code_directory

directory = code_directory("test-kernels", cache_name())
if directory is not None:
    enable_cache(directory)
