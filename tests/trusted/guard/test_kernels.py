"""The guard's compiled loops are the formulas of docs/masking.md, bit for bit, in Python integers and plain float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.trusted.guard.honest import send
from tsqp.arith.modulus import P
from tsqp.trusted.guard import kernels

Array = np.ndarray[Any, np.dtype[Any]]

ERASED = int(kernels.ERASED)
HUGE = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).tiny)

SIZES = st.integers(1, 70)
ROWS = st.integers(1, 4)
LIMITS = st.one_of(st.integers(127, 32_639), st.sampled_from([127, 128, 32_639]))
EDGES = st.sampled_from([0, 1, 2, (P - 1) // 2 - 1, (P - 1) // 2, (P + 1) // 2, P - 2, P - 1])
FIELD = st.one_of(st.integers(0, P - 1), EDGES)
FINITE = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-45, TINY, -TINY, HUGE, -HUGE, 0.5, 1.5, 2.5, -127.5]),
)
SCALES = st.one_of(st.floats(2.0**-20, 2.0**20, width=32), st.sampled_from([1.0, TINY, 2.0**-100]))
BIASES = st.one_of(st.floats(-(2.0**20), 2.0**20, width=32), st.sampled_from([0.0, -0.0]))


def floats(shape: tuple[int, ...], elements: st.SearchStrategy[float]) -> st.SearchStrategy[Array]:
    return arrays(np.float32, shape, elements=elements)


def field(shape: tuple[int, ...]) -> st.SearchStrategy[Array]:
    return arrays(np.uint32, shape, elements=FIELD)


def dot(a: Array, b: Array) -> int:
    return sum(int(x) * int(y) for x, y in zip(a, b, strict=True)) % P


def quantised(row: Array, limit: int) -> tuple[list[int], np.float32]:
    """xq and s_x of one row."""
    scale = np.abs(row).max() / np.float32(limit)
    if scale < np.float32(TINY):
        scale = np.float32(1)
    return [max(-limit, min(limit, int(np.round(value / scale)))) for value in row], scale


def bits(values: Any) -> Array:
    return np.asarray(values, np.float32).view(np.uint32)


@given(st.data())
def test_dot_products(data: st.DataObject) -> None:
    n, rows, k = data.draw(SIZES), data.draw(ROWS), data.draw(ROWS)
    values, vectors, out = data.draw(field((rows, n))), data.draw(field((k, n))), np.empty((rows, k), np.uint32)
    kernels.project(values, vectors, out, 0, rows)
    assert out.tolist() == [[dot(value, vector) for vector in vectors] for value in values]


@pytest.mark.parametrize("n", [1, 2, 3, 132_104, 152_064])
@pytest.mark.parametrize("value", [P - 1, P - 2, (P - 1) // 2, 1])
def test_dot_products_at_the_extremes(n: int, value: int) -> None:
    """152,064: the longest check vector, of the largest vocabulary in use."""
    values, out = np.full((1, n), value, np.uint32), np.empty((1, 1), np.uint32)
    kernels.project(values, values, out, 0, 1)
    assert out.tolist() == [[value * value * n % P]]


def test_a_sum_that_needs_its_last_reduction() -> None:
    """The sum is 2⁶³ - 1: the halves and what is above them add up to 2³² - 1, of which one reduction leaves 2³¹."""
    values, vector = np.array([[P - 1, P - 1, 8, 7]], np.uint32), np.array([[P - 1, P - 1, P - 1, 1]], np.uint32)
    out = np.empty((1, 1), np.uint32)
    kernels.project(values, vector, out, 0, 1)
    assert out.tolist() == [[dot(values[0], vector[0])]]


def test_a_sum_that_is_a_multiple_of_p_is_zero() -> None:
    values, out = np.array([[1, P - 1], [P - 1, 1]], np.uint32), np.empty((2, 1), np.uint32)
    kernels.project(values, np.ones((1, 2), np.uint32), out, 0, 2)
    assert out.tolist() == [[0], [0]]


@given(st.data())
def test_rows_are_quantised_and_masked(data: st.DataObject) -> None:
    n, rows, k, limit = data.draw(SIZES), data.draw(ROWS), data.draw(ROWS), data.draw(LIMITS)
    x, projections = data.draw(floats((rows, n), FINITE)), data.draw(field((k, n)))
    pads = data.draw(st.one_of(st.none(), field((rows, n))))
    given_pads = None if pads is None else pads.copy()
    out, scales, expected, verdicts = send(x, limit, projections, pads)
    assert verdicts.tolist() == [kernels.OK] * rows
    for row in range(rows):
        xq, scale = quantised(x[row], limit)
        sent = xq if given_pads is None else [(q + int(r)) % P for q, r in zip(xq, given_pads[row], strict=True)]
        assert out[row].tolist() == sent
        assert bits(scales[row]) == bits(scale)
        assert expected[row].tolist() == [
            sum(v * int(w) for v, w in zip(sent, vector, strict=True)) % P for vector in projections
        ]
    if pads is not None:
        assert set(pads.flat) == {ERASED}


@pytest.mark.parametrize("masked", [True, False])
def test_halves_go_to_the_even_number(masked: bool) -> None:
    x = np.array([[127, 0.5, 1.5, 2.5, 126.5, -0.5, -1.5, -2.5, -126.5]], np.float32)
    out, *_ = send(x, 127, np.ones((1, 9), np.uint32), np.zeros((1, 9), np.uint32) if masked else None)
    assert out.astype(np.int64).tolist() == [[v % P if masked else v for v in [127, 0, 2, 2, 126, 0, -2, -2, -126]]]


@given(st.data(), st.sampled_from([float("nan"), float("inf"), float("-inf")]))
def test_a_row_that_is_no_numbers_goes_nowhere(data: st.DataObject, broken: float) -> None:
    n = data.draw(SIZES)
    x = data.draw(floats((3, n), FINITE))
    x[1, data.draw(st.integers(0, n - 1))] = broken
    for pads in (None, data.draw(field((3, n)))):
        out, scales, expected, verdicts = send(x, 32_639, np.ones((2, n), np.uint32), pads)
        assert verdicts.tolist() == [kernels.OK, kernels.NOT_FINITE, kernels.OK]
        assert not out[1].any()
        assert not expected[1].any()
        assert scales[1] == 0
        assert pads is None or set(pads.flat) == {ERASED}  # also of that row


@pytest.mark.parametrize("bad", [ERASED, P, P + 1, 2**31])
@pytest.mark.parametrize("column", [0, 5])
def test_a_pad_that_is_no_number_mod_p_masks_nothing(bad: int, column: int) -> None:
    x, pads = np.ones((3, 6), np.float32), np.full((3, 6), 7, np.uint32)
    pads[2, column] = bad
    out, _, expected, verdicts = send(x, 127, np.ones((2, 6), np.uint32), pads)
    assert verdicts.tolist() == [kernels.OK, kernels.OK, kernels.ERASED_PAD]
    assert not out[2].any()
    assert not expected[2].any()
    assert set(pads.flat) == {ERASED}


def test_masking_without_pads_is_refused() -> None:
    out, scales, expected = np.zeros((2, 6), np.uint32), np.zeros(2, np.float32), np.zeros((2, 1), np.uint32)
    verdicts, projections = np.full(2, kernels.UNSEEN, np.uint8), np.ones((1, 6), np.uint32)
    x, pads = np.ones((2, 6), np.float32), np.empty((2, 0), np.uint32)
    kernels.quantise_and_mask(x, np.float32(127), projections, True, pads, out, scales, expected, verdicts, 0, 2)
    assert verdicts.tolist() == [kernels.ERASED_PAD] * 2
    assert not out.any()


def test_send_keeps_to_its_rows() -> None:
    x, projections, pads = np.ones((5, 6), np.float32), np.ones((1, 6), np.uint32), np.full((4, 6), 7, np.uint32)
    out, scales, expected = np.zeros((5, 6), np.uint32), np.zeros(5, np.float32), np.zeros((5, 1), np.uint32)
    verdicts = np.full(5, kernels.UNSEEN, np.uint8)
    kernels.quantise_and_mask(x, np.float32(127), projections, True, pads, out, scales, expected, verdicts, 1, 3)
    inside = [False, True, True, False, False]
    assert (verdicts == kernels.OK).tolist() == inside
    assert set(verdicts[[0, 3, 4]]) == {kernels.UNSEEN}
    for touched in (out.any(axis=1), scales != 0, expected.any(axis=1)):
        assert touched.tolist() == inside
    assert (pads[:2] == ERASED).all()  # pads are those of these rows alone
    assert (pads[2:] == 7).all()


def accept(
    reply: Array,
    check_vectors: Array,
    expected: Array,
    products: Array | None,
    scaling: tuple[Array, Array, Array],
    ends: Sequence[int] = (),
) -> tuple[Array, list[int]]:
    """All rows through the loop of that name: out, with 77 where nothing was written, and verdicts.

    ``ends``: of slices, but for the last one.
    """
    out, verdicts = np.full(reply.shape, 77, np.float32), np.full(len(reply), kernels.UNSEEN, np.uint8)
    undo = np.empty((len(reply), 0), np.uint32) if products is None else products
    check = (check_vectors, expected, np.array([0, *ends, reply.shape[1]]), products is not None, undo)
    kernels.verify_and_unmask(reply, *check, scaling, out, verdicts, 0, len(reply))
    return out, verdicts.tolist()


@given(st.data())
def test_right_rows_are_unmasked_and_rescaled(data: st.DataObject) -> None:
    n, rows, k = data.draw(SIZES), data.draw(ROWS), data.draw(ROWS)
    reply, check_vectors = data.draw(field((rows, n))), data.draw(field((k, n)))
    expected = np.array([[dot(row, secret) for secret in check_vectors] for row in reply], np.uint32)
    products = data.draw(st.one_of(st.none(), field((rows, n))))
    s_x, s_w, b = (data.draw(floats((m,), of)) for m, of in ((rows, SCALES), (n, SCALES), (n, BIASES)))
    exact = (reply.astype(np.int64) - (0 if products is None else products.astype(np.int64))) % P
    centred = np.where(exact > (P - 1) // 2, exact - P, exact)
    out, verdicts = accept(reply, check_vectors, expected, products, (s_x, s_w, b))
    assert verdicts == [kernels.OK] * rows
    assert np.array_equal(bits(out), bits((centred.astype(np.float32) * s_x[:, None]) * s_w + b))
    assert products is None or set(products.flat) == {ERASED}


@pytest.mark.parametrize("bias", [0.0, -0.0])
def test_the_sign_of_zero(bias: float) -> None:
    reply, one = np.array([[0, P - 1]], np.uint32), np.zeros((1, 2), np.uint32)  # 0, and -1 that rounds to -0
    scaling = (np.array([TINY], np.float32), np.array([1, TINY], np.float32), np.array([bias] * 2, np.float32))
    out, _ = accept(reply, one, np.zeros((1, 1), np.uint32), None, scaling)
    assert np.signbit(out).tolist() == [[False, np.signbit(bias)]]


@given(st.data())
def test_wrong_rows_are_named_and_nothing_is_made_of_them(data: st.DataObject) -> None:
    n, k, masked = data.draw(SIZES), data.draw(ROWS), data.draw(st.booleans())
    reply, check_vectors = (
        data.draw(field((4, n))),
        data.draw(arrays(np.uint32, (k, n), elements=st.integers(1, P - 1))),
    )
    expected = np.array([[dot(row, secret) for secret in check_vectors] for row in reply], np.uint32)
    products = data.draw(field((4, n))) if masked else None
    column, error = data.draw(st.integers(0, n - 1)), data.draw(st.integers(1, P - 1))
    reply[1, column] = (int(reply[1, column]) + error) % P
    assume(reply[2, column] < 2**32 - P)
    reply[2, column] += np.uint32(P)
    if products is not None:
        products[3, column] = ERASED
    ones = (np.ones(4, np.float32), np.ones(n, np.float32), np.zeros(n, np.float32))
    out, verdicts = accept(reply, check_vectors, expected, products, ones)
    last = kernels.ERASED_PAD if masked else kernels.OK
    assert verdicts == [kernels.OK, kernels.MISMATCH, kernels.OUT_OF_RANGE, last]
    assert (out[1:3] == 77).all()


def test_each_check_vector_is_compared() -> None:
    """In expected, one of four sums at a time is another."""
    reply, check_vectors = np.full((4, 3), 5, np.uint32), np.arange(1, 13, dtype=np.uint32).reshape(4, 3)
    expected = np.array([[dot(row, secret) for secret in check_vectors] for row in reply], np.uint32)
    expected += np.eye(4, dtype=np.uint32)
    ones = (np.ones(4, np.float32), np.ones(3, np.float32), np.zeros(3, np.float32))
    _, verdicts = accept(reply, check_vectors, expected, None, ones)
    assert verdicts == [kernels.MISMATCH] * 4


def test_accept_keeps_to_its_rows() -> None:
    reply, products = np.full((2, 6), 9, np.uint32), np.full((4, 6), 2, np.uint32)
    check_vectors, expected = np.ones((1, 6), np.uint32), np.full((5, 1), 54, np.uint32)
    out, verdicts = np.full((5, 6), 77, np.float32), np.full(5, kernels.UNSEEN, np.uint8)
    scaling = (np.ones(5, np.float32), np.ones(6, np.float32), np.zeros(6, np.float32))
    check = (check_vectors, expected, np.array([0, 6]), True, products)
    kernels.verify_and_unmask(reply, *check, scaling, out, verdicts, 2, 4)
    inside = [False, False, True, True, False]
    assert verdicts.tolist() == [kernels.OK if row else kernels.UNSEEN for row in inside]
    assert out[:, 0].tolist() == [7 if row else 77 for row in inside]
    assert (products[:2] == ERASED).all()  # reply and products are those of these rows alone
    assert (products[2:] == 2).all()
