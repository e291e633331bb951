"""How loops are compiled: by numba, with the interpreter lock released, and kept on disk where that was asked for.

What lies in the cache is code that this process loads, so the directory must be one that nobody else can write
(``private_path``). Only a directory that this package named counts: numba's own variable does not turn a cache on.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

_CACHE = "NUMBA_CACHE_DIR"
_entries: list[Any] = []  # what addresses were given out of
_directory = ""  # where this process keeps compiled loops; nowhere, until it is told to

# Every module that has loops, how they are compiled, and what they take from elsewhere.
SOURCES = (
    "arith/jit.py",
    "arith/atomic.py",
    "arith/modulus.py",
    "arith/digits.py",
    "arith/loops.py",
    "arith/row_tile.py",
    "arith/vnni.py",
    "arith/amx.py",
    "arith/crew.py",
    "checkpoint/gguf_loops.py",
    "model/compiled.py",
    "model/adapter_loops.py",
    "model/oblivious_loops.py",
    "model/oram_loops.py",
    "model/attention_tiles.py",
    "model/compiled_rows.py",
    "model/compiled_attention.py",
    "model/int8_attention.py",
    "wire/exchange.py",
    "wire/answering.py",
    "trusted/guard/kernels.py",
    "trusted/step_loops.py",
    "untrusted/product_loops.py",
    "untrusted/call_loops.py",
    "bench/null_steps.py",
    "bench/read_loop.py",
)

Loop = Callable[..., Any]


def enable_cache(directory: Path) -> None:
    """Keep compiled loops in a private directory that is there. For those whose modules are imported afterwards."""
    global _directory
    _directory = os.environ[_CACHE] = str(directory)


def keeps_loops() -> bool:
    """Whether this process keeps them, from what is imported now on."""
    return bool(_directory)


def cache_name() -> str:
    """What to call that directory: numba does not notice a change in what a loop takes from another module."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in loop_sources())).hexdigest()[:16]


def loop_sources() -> list[Path]:
    """What compiled loops are made of, as far as it is installed: an image may have one side only."""
    package = Path(__file__).parents[1]
    return [path for path in (package / source for source in SOURCES) if path.is_file()]


def kernel(loop: Loop) -> Loop:
    """A loop to be called from Python. Rounding and order are what its source says."""
    # numba may have been loaded before this was set.
    setattr(numba.config, "CACHE_DIR", _directory)  # noqa: B010  (unknown to its type hints)
    return numba.njit(nogil=True, error_model="numpy", cache=bool(_directory))(loop)


def entry(loop: Loop, signature: Any) -> int:
    """The address of a loop, compiled now, for compiled loops that call it without being compiled together with it.

    An exception in it is printed, and goes no further. It must be a function of a module, which is kept from then on.
    """
    setattr(numba.config, "CACHE_DIR", _directory)  # noqa: B010
    _entries.append(numba.cfunc(signature, error_model="numpy", cache=bool(_directory))(loop))
    return int(_entries[-1].address)


def inline(loop: Loop) -> Loop:
    """A part of loops, put in where it is used."""
    return numba.njit(inline="always", error_model="numpy")(loop)
