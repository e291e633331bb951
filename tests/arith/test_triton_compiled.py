"""Triton's kernels compile for a GPU, without one: for the instructions that they are meant to use."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tsqp.arith import triton_loops
from tsqp.arith.triton_field import CANDIDATES, MANY, TABLE, Tiles, _options

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {"x_ptr": "*i32", "digits_ptr": "*i8", "w_ptr": "*i8", "y_ptr": "*i32", "parts_ptr": "*i32"}
ANY_NUMBER = ("rows", "parts")  # of which no variants are made; the others are multiples of 16, as in models


def compiled(function: Any, constants: dict[str, int], **options: int) -> Any:
    names = function.arg_names
    types = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names}
    if constants.get("DIGITS") == 2 and "x_ptr" in types:
        types["x_ptr"] = "*i16"
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in (*constants, *ANY_NUMBER)}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=types, constexprs=values, attrs=aligned)
    return triton.compile(source, target=HOPPER, options=options)


@pytest.mark.slow
@pytest.mark.parametrize("digits", [4, 2])
@pytest.mark.parametrize("tiles", [*(tiles for _, tiles in TABLE), MANY, *CANDIDATES], ids=str)
def test_products_use_the_integer_tensor_cores(tiles: Tiles, digits: Any) -> None:
    constants = _options(tiles, digits)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    many = triton_loops.digits_at_once if tiles.at_once else triton_loops.many_rows
    done = compiled(many if tiles.split else triton_loops.few_rows, constants, **options)
    wanted = "wgmma.mma_async.sync.aligned" if tiles.rows >= 64 else "mma.sync.aligned"
    lines = [line for line in done.asm["ptx"].splitlines() if wanted in line]
    assert lines
    assert all(".s32.s8.s8" in line for line in lines)
    assert done.metadata.shared <= 227 * 1024
    assert sum(spilled_bytes(done.asm["ptx"])) <= (0 if tiles.at_once else 64)


def spilled_bytes(ptx: str) -> list[int]:
    """What registers had no room for, stored and loaded, by NVIDIA's assembler, which travels with triton."""
    command = [triton.knobs.nvidia.ptxas.path, "--verbose", "--gpu-name=sm_90a", "--output-file=/dev/null", "-"]
    said = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    return [int(size) for size in re.findall(r"(\d+) bytes spill (?:stores|loads)", said)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["split", "add_parts"])
def test_what_goes_before_and_after_compiles(name: str) -> None:
    function = getattr(triton_loops, name)
    constants = {"SIZE": 1024, **({"DIGITS": 4} if name == "split" else {})}
    assert compiled(function, constants).asm["cubin"]
