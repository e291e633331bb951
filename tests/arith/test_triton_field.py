"""Triton's products mod p, interpreted: those of Python integers, for any shape, number and way of cutting it up."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.arith import interpreted
from tests.arith.interpreted import AT_ONCE, FEW, MANY
from tests.arith.kernels import SATURATES
from tsqp import arith
from tsqp.arith import self_test
from tsqp.arith.field import MAX_FIELD_TERMS, MAX_SMALL, Digits, FieldWeights
from tsqp.arith.modulus import P
from tsqp.arith.product import BlockedKernel, DigitKernel
from tsqp.arith.self_test import pick_kernel
from tsqp.arith.tensor_cores import DeviceFieldKernel, DeviceFieldWeights, TensorCoreKernel
from tsqp.arith.triton_field import CANDIDATES, TABLE, Tiles, TritonKernel, tiles_for
from tsqp.errors import TsqpWarning

TILES = pytest.mark.parametrize("tiles", [FEW, MANY, AT_ONCE], ids=["few_rows", "many_rows", "digits_at_once"])
DIGITS = pytest.mark.parametrize("digits", [4, 2])

# Where a digit carries, where the sign turns, and numbers whose digits are all -128 or all 127.
EXTREMES = {
    4: [0, 1, 127, 128, 255, 256, P - 1, P // 2, P // 2 + 1, 0x3F7F7F7F, P - 0x3F7F7F80, 0x7F7F7F7F, P - 0x808080],
    2: [0, 1, -1, 127, 128, -128, -129, MAX_SMALL, -MAX_SMALL, -32_640],
}


def numbers(digits: int, shape: tuple[int, int], generator: np.random.Generator, *, extreme: bool) -> np.ndarray:
    dtype = np.int32 if digits == 4 else np.int16
    if extreme:
        return generator.choice(np.array(EXTREMES[digits]), shape).astype(dtype)
    return generator.integers(*((0, P) if digits == 4 else (-MAX_SMALL, MAX_SMALL + 1)), shape).astype(dtype)


def weights(shape: tuple[int, int], generator: np.random.Generator, *, extreme: bool) -> np.ndarray:
    if extreme:
        return generator.choice(np.array([-127, 127, 0]), shape).astype(np.int8)
    return generator.integers(-127, 128, shape).astype(np.int8)


def exact(x: np.ndarray, w: np.ndarray) -> list[list[int]]:
    """By Python integers."""
    found: list[list[int]] = ((x.astype(object) @ w.T.astype(object)) % P).tolist()
    return found


def product(x: np.ndarray, w: np.ndarray, digits: Digits, kernel: DigitKernel) -> list[list[int]]:
    out = torch.full((len(x), len(w)), -5, dtype=torch.int32)
    DeviceFieldWeights.of(torch.from_numpy(w), kernel).product(torch.from_numpy(x), digits, out=out)
    return out.tolist()


@TILES
@DIGITS
@settings(max_examples=6)
@given(
    rows=st.integers(1, 18),
    inner=st.integers(1, 140),
    columns=st.integers(1, 36),
    extreme=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_any_number(
    tiles: Tiles, digits: Digits, rows: int, inner: int, columns: int, extreme: bool, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    x = numbers(digits, (rows, inner), generator, extreme=extreme)
    w = weights((columns, inner), generator, extreme=extreme)
    assert product(x, w, digits, interpreted.kernel(tiles)) == exact(x, w)


@DIGITS
def test_the_inner_size_is_split_where_columns_do_not_fill_the_device(digits: Digits) -> None:
    generator = np.random.default_rng(digits)
    x, w = (make((size, 2_100), generator, extreme=True) for make, size in ((weights, 40), (weights, 40)))
    x = numbers(digits, (3, 2_100), generator, extreme=True)
    kernel = interpreted.kernel(Tiles(16, 64, 128, warps=4, stages=3, split=False), processors=8)
    assert [kernel._part(2_100, programs, 128, torch.from_numpy(x)) for programs in (1, 8, 16)] == [640, 1152, 2176]
    assert product(x, w, digits, kernel) == exact(x, w)


@TILES
@pytest.mark.parametrize(("number", "weight"), [(P // 2 - 63, 127), (P - 0x808080, 127), (P - 0x808080, -127)])
def test_the_largest_sums_fit_into_32_bits(tiles: Tiles, number: int, weight: int) -> None:
    wide = replace(tiles, rows=1, columns=1, inner=8_192)  # no tile of a device
    x, w = np.full((1, MAX_FIELD_TERMS), number, np.int32), np.full((1, MAX_FIELD_TERMS), weight, np.int8)
    assert product(x, w, 4, interpreted.kernel(wide)) == [[number * weight * MAX_FIELD_TERMS % P]]


@TILES
def test_a_hostile_number_overflows_nothing(tiles: Tiles) -> None:
    x = np.array([[-1, -(2**31), 2**31 - 1, 0x7F7F7F7F]], np.int32)
    w = np.array([[127] * 4], np.int8)
    ((y,),) = product(x, w, 4, interpreted.kernel(tiles))
    assert 0 <= y < P


@TILES
def test_rows_of_a_larger_tensor(tiles: Tiles) -> None:
    generator = np.random.default_rng(3)
    x, w = numbers(4, (5, 70), generator, extreme=False), weights((33, 64), generator, extreme=False)
    out = torch.full((5, 40), -5, dtype=torch.int32)
    kernel = interpreted.kernel(tiles)
    kernel.field_product(torch.from_numpy(x)[:, :64], torch.from_numpy(w), 4, out[:, :33])
    assert out[:, :33].tolist() == exact(x[:, :64], w)
    assert (out[:, 33:] == -5).all()
    with pytest.raises(ValueError, match="closely"):
        kernel.field_product(torch.from_numpy(x).t(), torch.from_numpy(w), 4, out)


@TILES
def test_no_rows(tiles: Tiles) -> None:
    out = torch.empty(0, 8, dtype=torch.int32)
    interpreted.kernel(tiles).field_product(torch.empty(0, 8, dtype=torch.int32), torch.ones(8, 8).char(), 4, out)


@DIGITS
@SATURATES
@pytest.mark.parametrize("shape", [(9, 64, 24), (3, 30, 9)])
def test_what_takes_its_place_is_the_same(digits: Digits, shape: tuple[int, int, int]) -> None:
    """The fallback of a device: split digits, ``_int_mm``, and a join."""
    rows, inner, columns = shape
    generator = np.random.default_rng(rows)
    x = numbers(digits, (rows, inner), generator, extreme=True)
    w = weights((columns, inner), generator, extreme=True)
    assert product(x, w, digits, TensorCoreKernel()) == exact(x, w)


def test_every_number_of_rows_has_tiles() -> None:
    for rows in (1, 16, 17, 32, 33, 64, 65, 8_192):
        tiles = tiles_for(rows)
        assert tiles.rows >= min(rows, 64)
        assert tiles.split == (rows > 64)
    for tiles in (*(tiles for _, tiles in TABLE), tiles_for(65), *CANDIDATES):
        accumulators = (1 if tiles.split and not tiles.at_once else 4) * tiles.rows * tiles.columns / (32 * tiles.warps)
        assert accumulators <= 128  # registers of a thread, of 255
        assert tiles.inner % 32 == 0  # what an instruction multiplies


@pytest.mark.slow
@DIGITS
@pytest.mark.parametrize("rows", [1, 40, 100])
@pytest.mark.parametrize(("columns", "inner"), [(384, 256), (256, 1_024)])
def test_groups_of_a_model_an_eighth_as_wide(digits: Digits, rows: int, columns: int, inner: int) -> None:
    """Those of Llama-3.2-1B, by the tiles of a device."""
    generator = np.random.default_rng(rows)
    x = torch.from_numpy(numbers(digits, (rows, inner), generator, extreme=rows == 40))
    w = torch.from_numpy(weights((columns, inner), generator, extreme=rows == 40))
    out = torch.full((rows, columns), -5, dtype=torch.int32)
    DeviceFieldWeights.of(w, interpreted.kernel(None, processors=132)).product(x, digits, out=out)
    assert torch.equal(out.long(), (x.long() @ w.long().t()) % P)


@pytest.mark.slow
def test_the_self_test_runs_every_tile() -> None:
    assert self_test.is_exact(interpreted.kernel(None, processors=132), torch.device("cpu"))


class Wrong(TritonKernel):
    """One that is off by one in the last column of many rows."""

    def field_product(self, x: torch.Tensor, w: torch.Tensor, digits: Digits, out: torch.Tensor) -> None:
        DeviceFieldWeights.of(w, BlockedKernel()).product(x, digits, out=out)
        out[64:, -1] ^= 1


class Refused(TritonKernel):
    def field_product(self, x: torch.Tensor, w: torch.Tensor, digits: Digits, out: torch.Tensor) -> None:
        raise SyntaxError("no such instruction\non this device")  # triton's errors have no common kind


class Right(DeviceFieldKernel):
    def __init__(self, *_: Any) -> None:
        pass

    def field_product(self, x: torch.Tensor, w: torch.Tensor, digits: Digits, out: torch.Tensor) -> None:
        FieldWeights.of(w, BlockedKernel()).product(x, digits, out=out)

    def accumulate(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return BlockedKernel().accumulate(x, w)


def picked(monkeypatch: pytest.MonkeyPatch, kind: Any) -> DigitKernel:
    """What a CUDA device would get if Triton's kernel were of this kind. The device is the CPU under that name."""
    monkeypatch.setattr(self_test, "TritonKernel", kind)
    monkeypatch.setattr(self_test, "TensorCoreKernel", BlockedKernel)
    monkeypatch.setattr(self_test, "_passes", lambda kernel, _, passes=self_test._passes: passes(kernel, "cpu"))
    return pick_kernel.__wrapped__(SimpleNamespace(type="cuda"))


def test_the_self_test_takes_a_kernel_that_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(picked(monkeypatch, Right), Right)


@pytest.mark.parametrize(
    ("kind", "reason"), [(Wrong, "its products are wrong here"), (Refused, "SyntaxError: no such instruction")]
)
def test_a_kernel_that_fails_is_replaced_and_named(monkeypatch: pytest.MonkeyPatch, kind: Any, reason: str) -> None:
    with pytest.warns(TsqpWarning, match=rf"Triton's kernel is not used \({reason}\)"):
        assert isinstance(picked(monkeypatch, kind), BlockedKernel)


def test_without_triton_products_take_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tsqp.arith.triton_loops", raising=False)
    monkeypatch.delattr(arith, "triton_loops", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)  # what makes its import fail
    with pytest.warns(TsqpWarning, match="not used .(ModuleNotFound|Import)Error"):
        assert isinstance(picked(monkeypatch, TritonKernel), BlockedKernel)
