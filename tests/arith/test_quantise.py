"""The quantiser is its formula, bit for bit, whatever the shape, the block or the number of threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tsqp.arith import quantise
from tsqp.arith.quantise import LEAST_SCALE, LEVELS, quantise_rows

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
MATRICES = arrays(np.float32, st.tuples(st.integers(1, 7), st.integers(1, 40)), elements=FINITE)


def reference(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The formula in numpy, row by row."""
    digits, scales = np.empty(x.shape, np.int8), np.empty(len(x), np.float32)
    for row, values in enumerate(x):
        scale = np.abs(values).max() / np.float32(127)
        scales[row] = scale if scale >= np.float32(2.0**-126) else np.float32(1)
        digits[row] = np.clip(np.round(values / scales[row]), -127, 127)  # numpy rounds half to even
    return digits, scales


@given(MATRICES)
def test_it_is_the_formula(x: np.ndarray) -> None:
    digits, scales = reference(x)
    got = quantise_rows(torch.from_numpy(x))
    assert np.array_equal(got.values.numpy(), digits)
    assert np.array_equal(got.scales.numpy(), scales)


@given(MATRICES)
def test_digits_are_bounded_and_half_a_scale_is_the_error(x: np.ndarray) -> None:
    got = quantise_rows(torch.from_numpy(x))
    assert int(got.values.abs().max()) <= LEVELS
    back = got.values.double() * got.scales.double().unsqueeze(1)
    error = (back - torch.from_numpy(x).double()).abs()
    assert bool((error <= got.scales.double().unsqueeze(1) * (0.5 + 2.0**-15)).all())
    largest = torch.from_numpy(x).abs().amax(dim=1)
    full = largest >= 127 * LEAST_SCALE
    assert bool((got.values.abs().amax(dim=1)[full] == LEVELS).all())  # every level is used


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, LEAST_SCALE])
def test_a_row_of_nothing_has_scale_one_and_no_digits(value: float) -> None:
    got = quantise_rows(torch.full((2, 5), value))
    assert got.scales.tolist() == [1.0, 1.0]
    assert not got.values.any()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_no_number_shows_in_the_scale(value: float) -> None:
    x = torch.ones(2, 4)
    x[1, 2] = value
    scales = quantise_rows(x).scales
    assert torch.isfinite(scales).tolist() == [True, False]


def test_halves_go_to_the_even_digit() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert quantise_rows(x).values.tolist() == [[127, 0, 2, 2, 0, -2, -2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_and_threads_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(501, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = quantise_rows(x)
    monkeypatch.setattr(quantise, "BLOCK_ELEMENTS", 700)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            got = quantise_rows(x)
        finally:
            torch.set_num_threads(1)
        assert torch.equal(got.values, whole.values)
        assert torch.equal(got.scales, whole.scales)
    digits, scales = reference(x.float().numpy())
    assert np.array_equal(whole.values.numpy(), digits)
    assert np.array_equal(whole.scales.numpy(), scales)
