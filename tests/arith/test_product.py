"""Products of digits are exact in every kernel that is used, and the self-test refuses one that is not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.arith.kernels import CPU, KERNELS
from tsqp.arith.product import (
    MAX_INT8_TERMS,
    BlockedKernel,
    DigitKernel,
    OffsetKernel,
)
from tsqp.arith.self_test import exact_product, is_exact

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 2100), st.integers(1, 50))


def digits(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)


@pytest.mark.parametrize("kernel", KERNELS)
@given(SIZES, st.integers(0, 2**31))
def test_against_int64(kernel: DigitKernel, sizes: tuple[int, int, int], seed: int) -> None:
    rows, inner, columns = sizes
    x, w = digits(rows, inner, seed), digits(columns, inner, seed + 1)
    assert torch.equal(exact_product(kernel, x, w).long(), x.long() @ w.long().t())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sum_still_fits(kernel: DigitKernel, sign: int) -> None:
    x = torch.full((1, MAX_INT8_TERMS), 127, dtype=torch.int8)
    w = torch.full((2, MAX_INT8_TERMS), 127 * sign, dtype=torch.int8)
    assert exact_product(kernel, x, w).tolist() == [[sign * 127 * 127 * MAX_INT8_TERMS] * 2]
    # The offset kernel adds 128 to x: the bound counts that.
    assert (127 + 128) * 127 * MAX_INT8_TERMS < 2**31 <= (127 + 128) * 127 * (MAX_INT8_TERMS + 1)


class Saturating(OffsetKernel):
    """What a processor without VNNI does: pairs of products added in 16 bits."""

    def accumulate(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        terms = (x.view(torch.uint8) ^ 128).long().unsqueeze(1) * w.long().unsqueeze(0)
        pairs = terms.unflatten(2, (-1, 2)).sum(dim=3).clamp(-(2**15), 2**15 - 1)
        return pairs.sum(dim=2).to(torch.int32)


def test_the_self_test_finds_saturation() -> None:
    assert is_exact(BlockedKernel(), CPU)
    assert not is_exact(Saturating(), CPU)


def test_without_vnni_the_blocked_kernel_is_picked() -> None:
    """oneDNN told to use AVX2 only really saturates; whichever way, what is picked must be exact."""
    code = (
        "import tests.cached_loops, torch\nfrom tsqp.arith.product import *\nfrom tsqp.arith.self_test import *\n"
        "kernel = pick_kernel(torch.device('cpu'))\n"
        "print(type(kernel).__name__, is_exact(kernel, torch.device('cpu')))"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    name, exact = done.stdout.split()
    assert exact == "True"
    assert name == "BlockedKernel"
