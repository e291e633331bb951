"""Products mod p are those of Python's integers, with every kernel, and the compiled loops are their torch versions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.arith.kernels import KERNELS
from tsqp.arith import field
from tsqp.arith.digits import join, split
from tsqp.arith.digits_torch import join_torch, split_torch
from tsqp.arith.field import MAX_FIELD_TERMS, MAX_SMALL, Digits, FieldWeights
from tsqp.arith.modulus import MAX_CENTRED, P
from tsqp.arith.product import BlockedKernel, DigitKernel
from tsqp.arith.tensor_cores import DeviceFieldWeights

EXTREMES = [0, 1, 127, 128, MAX_CENTRED, MAX_CENTRED + 1, P - 128, P - 1]
CANONICAL = st.one_of(st.sampled_from(EXTREMES), st.integers(0, P - 1))
SMALL = st.one_of(st.sampled_from([0, 127, 128, MAX_SMALL, -MAX_SMALL]), st.integers(-MAX_SMALL, MAX_SMALL))
WEIGHT = st.one_of(st.sampled_from([-127, 0, 127]), st.integers(-127, 127))
SIZES = st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 6))


def product(x: np.ndarray, w: np.ndarray, kernel: DigitKernel) -> np.ndarray:
    """By the code under test, uint32 mod p: of uint32 x by four digits, of int16 x by two."""
    digits: Digits = 4 if x.dtype == np.uint32 else 2
    out = torch.full((len(x), len(w)), 0x55AA55AA, dtype=torch.int32)
    held = torch.from_numpy(x.view(np.int32) if digits == 4 else x)
    FieldWeights.of(torch.from_numpy(w), kernel).product(held, digits, out=out)
    return out.numpy().view(np.uint32)


def exact(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """In Python's integers."""
    return x.astype(object) @ w.T.astype(object)


@pytest.mark.parametrize("kernel", KERNELS)
@given(data=st.data(), sizes=SIZES)
def test_four_digits_mod_p(kernel: DigitKernel, data: st.DataObject, sizes: tuple[int, int, int]) -> None:
    rows, inner, columns = sizes
    x = data.draw(arrays(np.uint32, (rows, inner), elements=CANONICAL))
    w = data.draw(arrays(np.int8, (columns, inner), elements=WEIGHT))
    assert product(x, w, kernel).tolist() == (exact(x, w) % P).tolist()


@pytest.mark.parametrize("kernel", KERNELS)
@given(data=st.data(), sizes=SIZES)
def test_two_digits_mod_p(kernel: DigitKernel, data: st.DataObject, sizes: tuple[int, int, int]) -> None:
    rows, inner, columns = sizes
    x = data.draw(arrays(np.int16, (rows, inner), elements=SMALL))
    w = data.draw(arrays(np.int8, (columns, inner), elements=WEIGHT))
    assert product(x, w, kernel).tolist() == (exact(x, w) % P).tolist()


@pytest.mark.parametrize("kernel", KERNELS)
def test_two_digits_are_mod_p_where_the_product_is_larger(kernel: DigitKernel) -> None:
    x = np.full((2, 600), MAX_SMALL, np.int16)
    w = np.full((3, 600), 127, np.int8)
    true = exact(x, w)
    assert true[0, 0] >= 2**31
    assert product(x, w, kernel).tolist() == (true % P).tolist()


LOWEST = (-63 * 2**24 - 128 * (2**16 + 2**8 + 1)) % P  # the three low digits are -128
HIGHEST = 63 * 2**24 + 127 * (2**16 + 2**8 + 1)  # 127


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("value", [LOWEST, HIGHEST, 0, P - 1])
def test_the_longest_sum_of_extreme_digits(kernel: DigitKernel, value: int) -> None:
    assert split_torch(torch.tensor([[LOWEST, HIGHEST]]), 4)[:3].flatten(1).tolist() == [[0, 255]] * 3
    x = np.full((1, MAX_FIELD_TERMS), value, np.uint32)
    w = np.stack([np.full(MAX_FIELD_TERMS, weight, np.int8) for weight in (127, -127)])
    expected = [[value * weight * MAX_FIELD_TERMS % P for weight in (127, -127)]]
    assert product(x, w, kernel).tolist() == expected


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("value", [MAX_SMALL, -MAX_SMALL, -128 * 256 + 128])
def test_the_longest_sum_of_two_extreme_digits(kernel: DigitKernel, value: int) -> None:
    x = np.full((1, MAX_FIELD_TERMS), value, np.int16)
    w = np.full((1, MAX_FIELD_TERMS), -127, np.int8)
    assert product(x, w, kernel).tolist() == [[value * -127 * MAX_FIELD_TERMS % P]]


def test_longer_sums_are_refused() -> None:
    assert 128 * 127 * MAX_FIELD_TERMS < 2**31 <= 128 * 127 * (MAX_FIELD_TERMS + 1)
    with pytest.raises(ValueError, match=str(MAX_FIELD_TERMS)):
        FieldWeights.of(torch.empty(1, MAX_FIELD_TERMS + 1, dtype=torch.int8), BlockedKernel())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("digits", [2, 4])
def test_blocks_of_columns_change_nothing(kernel: DigitKernel, digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(digits)
    w = generator.integers(-127, 128, (50, 24), np.int8)
    x = generator.integers(0, P, (9, 24), np.uint32) if digits == 4 else generator.integers(-9, 9, (9, 24), np.int16)
    whole = product(x, w, kernel)
    monkeypatch.setattr(field, "_SUMS", 1)
    monkeypatch.setattr(field, "_LEAST_COLUMNS", 16)
    assert np.array_equal(product(x, w, kernel), whole)
    assert whole.tolist() == (exact(x, w) % P).tolist()


@given(arrays(np.uint32, st.tuples(st.integers(1, 4), st.integers(1, 30)), elements=CANONICAL))
def test_the_compiled_split_is_the_torch_split(x: np.ndarray) -> None:
    digits = np.empty((4, *x.shape), np.uint8)
    split(x, digits, 0, len(x))
    assert np.array_equal(digits, split_torch(torch.from_numpy(x.view(np.int32)), 4).numpy())
    weighted = sum((digits[m].astype(np.int64) - 128) << 8 * m for m in range(4))
    assert np.array_equal(weighted % P, x)


@given(arrays(np.int16, st.tuples(st.integers(1, 4), st.integers(1, 30)), elements=SMALL))
def test_the_compiled_split_of_small_numbers_is_the_torch_split(x: np.ndarray) -> None:
    digits = np.empty((2, *x.shape), np.uint8)
    split(x, digits, 0, len(x))
    assert np.array_equal(digits, split_torch(torch.from_numpy(x), 2).numpy())
    assert np.array_equal((digits[0].astype(np.int64) - 128) + 256 * (digits[1].astype(np.int64) - 128), x)


INT32 = st.one_of(st.sampled_from([0, -1, 2**31 - 1, -(2**31)]), st.integers(-(2**31), 2**31 - 1))


@pytest.mark.parametrize("digits", [2, 4])
@given(data=st.data(), rows=st.integers(1, 4), columns=st.integers(1, 9))
def test_the_compiled_join_is_the_torch_join(digits: int, data: st.DataObject, rows: int, columns: int) -> None:
    sums = data.draw(arrays(np.int32, (digits, rows, columns), elements=INT32))
    offsets = data.draw(arrays(np.int32, (columns,), elements=INT32))
    out = np.empty((rows, columns), np.uint32)
    join(sums, offsets, out, 0, rows)
    assert np.array_equal(out.view(np.int32), join_torch(torch.from_numpy(sums), torch.from_numpy(offsets)).numpy())
    wrapped = (sums.astype(np.int64) - offsets + 2**31) % 2**32 - 2**31  # what int32 makes of the difference
    assert np.array_equal(out, sum(wrapped[m].astype(object) << 8 * m for m in range(digits)) % P)


@pytest.mark.parametrize("digits", [2, 4])
def test_on_a_device_the_product_is_the_same(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA runs, in plain torch, here on the CPU: its kernel is tested where there is one."""
    generator = np.random.default_rng(digits)
    w = torch.from_numpy(generator.integers(-127, 128, (50, 24), np.int8))
    x = generator.integers(0, P, (9, 24), np.int32) if digits == 4 else generator.integers(-9, 9, (9, 24), np.int16)
    got, expected = torch.empty(2, 9, 50, dtype=torch.int32)
    FieldWeights.of(w, BlockedKernel()).product(torch.from_numpy(x), digits, out=expected)

    def refuse(_: torch.Tensor) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    monkeypatch.setattr("tsqp.arith.field.bits", refuse)
    DeviceFieldWeights.of(w, BlockedKernel()).product(torch.from_numpy(x), digits, out=got)
    assert torch.equal(got, expected)
