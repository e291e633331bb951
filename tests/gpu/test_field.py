"""Products mod p on the device are exact at the shapes of models, for every kernel that a worker may take."""

from __future__ import annotations

import warnings

import pytest
import torch
from benchmarks.gpu_field import GROUPS, product_mod_p

from tsqp.arith.field import MAX_FIELD_TERMS, MAX_SMALL, Digits
from tsqp.arith.modulus import P
from tsqp.arith.product import DigitKernel
from tsqp.arith.self_test import is_exact, pick_kernel
from tsqp.arith.tensor_cores import DeviceFieldWeights, TensorCoreKernel
from tsqp.arith.triton_field import CANDIDATES, Tiles, TritonKernel
from tsqp.errors import TsqpWarning

KINDS = pytest.mark.parametrize("kind", [TritonKernel, TensorCoreKernel])
DIGITS = pytest.mark.parametrize("digits", [4, 2])
EXTREMES = {4: [0, 1, P - 1, P // 2, P // 2 + 1, P // 2 - 63, P - 0x808080], 2: [0, MAX_SMALL, -MAX_SMALL, 127, -128]}


def numbers(rows: int, inner: int, digits: Digits, device: torch.device, *, extreme: bool) -> torch.Tensor:
    dtype = torch.int32 if digits == 4 else torch.int16
    if extreme:
        choice = torch.tensor(EXTREMES[digits], device=device)
        return choice[torch.randint(len(choice), (rows, inner), device=device)].to(dtype)
    least, end = (0, P) if digits == 4 else (-MAX_SMALL, MAX_SMALL + 1)
    return torch.randint(least, end, (rows, inner), device=device).to(dtype)


def weights(columns: int, inner: int, device: torch.device, *, extreme: bool) -> torch.Tensor:
    w = torch.randint(-127, 128, (columns, inner), dtype=torch.int8, device=device)
    return torch.where(w < 0, -127, 127).to(torch.int8) if extreme else w


def check(kernel: DigitKernel, x: torch.Tensor, w: torch.Tensor, digits: Digits) -> None:
    out = torch.full((len(x), len(w)), -5, dtype=torch.int32, device=x.device)
    DeviceFieldWeights.of(w, kernel).product(x, digits, out=out)
    assert torch.equal(out.long(), product_mod_p(x, w))


def test_the_picked_kernel_is_tritons(device: torch.device) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", TsqpWarning)
        assert isinstance(pick_kernel(device), TritonKernel)
    assert is_exact(TensorCoreKernel(), device)


@KINDS
@DIGITS
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_groups_of_a_model(
    kind: type[DigitKernel], digits: Digits, extreme: bool, group: str, device: torch.device
) -> None:
    columns, inner = GROUPS[group]
    w = weights(columns, inner, device, extreme=extreme)
    for rows in (1, 2, 16, 17, 33, 64, 65, 300, 1_024):
        check(kind(), numbers(rows, inner, digits, device, extreme=extreme), w, digits)


@KINDS
@pytest.mark.parametrize(("rows", "columns", "inner"), [(1, 1, 1), (3, 9, 30), (70, 33, 100), (20, 128_256, 2_048)])
def test_other_sizes(kind: type[DigitKernel], rows: int, columns: int, inner: int, device: torch.device) -> None:
    check(kind(), numbers(rows, inner, 4, device, extreme=True), weights(columns, inner, device, extreme=False), 4)


@KINDS
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums(kind: type[DigitKernel], sign: int, device: torch.device) -> None:
    w = torch.full((16, MAX_FIELD_TERMS), 127 * sign, dtype=torch.int8, device=device)
    for rows in (1, 70):
        for number in EXTREMES[4]:
            x = torch.full((rows, MAX_FIELD_TERMS), number, dtype=torch.int32, device=device)
            check(kind(), x, w, 4)


@pytest.mark.parametrize("tiles", CANDIDATES, ids=str)
def test_other_tiles(tiles: Tiles, device: torch.device) -> None:
    x, w = numbers(200, 2_048, 4, device, extreme=False), weights(3_072, 2_048, device, extreme=False)
    check(TritonKernel(tiles=tiles), x, w, 4)


@KINDS
@pytest.mark.parametrize("rows", [1, 100])
def test_a_captured_product_computes_what_is_there_when_it_is_replayed(
    kind: type[DigitKernel], rows: int, device: torch.device
) -> None:
    x, w = numbers(rows, 2_048, 4, device, extreme=False), weights(2_048, 2_048, device, extreme=False)
    product, out = DeviceFieldWeights.of(w, kind()), torch.empty(rows, 2_048, dtype=torch.int32, device=device)
    product.product(x, 4, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        product.product(x, 4, out=out)
    for _ in range(3):
        x.copy_(numbers(rows, 2_048, 4, device, extreme=False))
        out.fill_(-5)
        graph.replay()
        assert torch.equal(out.long(), product_mod_p(x, w))
