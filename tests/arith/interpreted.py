"""Triton's kernels without a GPU: a second copy of their module, interpreted in numpy, whatever else has loaded triton.

Only ``tl`` functions that are built in can be interpreted so; those that are kernels themselves (``tl.sum``) were made
when triton was loaded.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.util import find_spec, module_from_spec
from types import ModuleType

import pytest
import triton  # noqa: F401  (before the variable is set: what it loads later must fit what it has loaded)

from tsqp.arith.triton_field import Tiles, TritonKernel

FEW, MANY = Tiles(16, 32, 64, warps=4, stages=3, split=False), Tiles(16, 32, 64, warps=4, stages=3, split=True)
AT_ONCE = replace(MANY, at_once=True)


def kernel(tiles: Tiles | None = FEW, processors: int = 1) -> TritonKernel:
    """With small tiles, unless told otherwise: the interpreter takes a millisecond for each step of a program."""
    return TritonKernel(loops(), tiles, processors)


@cache
def loops() -> ModuleType:
    """``triton_loops``, interpreted. A module is interpreted or compiled by what the environment says as it loads."""
    spec = find_spec("tsqp.arith.triton_loops")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    return module
