"""A product in slices, of several workers: each slice is checked by itself, whatever the others are, and is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.trusted.guard.fakes import (
    KEY,
    MODES,
    OTHER,
    Array,
    Groups,
    Weights,
    expected_product,
    make_groups,
    make_linears,
)
from tests.trusted.guard.honest import HonestConnection
from tsqp.arith.modulus import P
from tsqp.errors import CheckFailed, ProductMismatch, ReplyRangeError

N, K = 24, 40
ENDS = (7, 8, 20)  # four slices, one of a single column


def sliced(ends: Sequence[int], *, checks: int = 2, columns: int = N, inner: int = K) -> tuple[Groups, Weights]:
    return make_groups({KEY: (columns, inner)}, checks=checks, slices={KEY: ends})


def some_input(rows: int, inner: int = K) -> torch.Tensor:
    return torch.randn(rows, inner, generator=torch.Generator().manual_seed(rows))


def tampered(weights: Weights, change: Callable[[Array], None]) -> HonestConnection:
    line = HonestConnection(weights)
    line.change = change
    return line


def add(y: Array, places: Sequence[tuple[int, int]], errors: Sequence[int]) -> None:
    """Other numbers mod p, in range."""
    for place, error in zip(places, errors, strict=True):
        y[place] = (int(y[place]) + error) % P


def failure(mode: str, groups: Groups, weights: Weights, change: Callable[[Array], None], rows: int = 3) -> CheckFailed:
    linears = make_linears(mode, tampered(weights, change), groups)
    pending = linears.start(KEY, some_input(rows, groups[KEY].in_features))
    with pytest.raises(CheckFailed) as caught:
        pending.wait()
    assert linears.products_checked == 0
    return caught.value


@given(ends=st.sets(st.integers(1, N - 1), max_size=N - 1), rows=st.integers(1, 20), mode=st.sampled_from(MODES))
def test_a_product_in_slices_is_the_product(ends: set[int], rows: int, mode: str) -> None:
    groups, weights = sliced(sorted(ends))
    x = some_input(rows)
    product = make_linears(mode, HonestConnection(weights), groups).start(KEY, x).wait()
    assert torch.equal(product, expected_product(groups[KEY], weights[KEY], x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 2, 16])
def test_memory_of_a_layer_serves_one_that_is_cut_into_more_slices(mode: str, rows: int) -> None:
    """Layers of a team are cut as they like: what the check is to find has a number for each slice."""
    shape = {KEY: (N, K), OTHER: (N, K)}
    groups, weights = make_groups(shape, slices={KEY: (), OTHER: ENDS})
    linears = make_linears(mode, HonestConnection(weights), groups)
    for key in (KEY, OTHER, KEY):
        x = linears.input(key, rows)
        x.copy_(some_input(rows))
        pending = linears.start(key, x)
        assert torch.equal(pending.wait(), expected_product(groups[key], weights[key], x))
        pending.release()


@pytest.mark.parametrize("checks", [1, 3])
def test_projections_are_of_each_slice(checks: int) -> None:
    groups, weights = sliced(ENDS, checks=checks)
    group, wq = groups[KEY], weights[KEY].numpy().astype(object)
    assert group.bounds.tolist() == [0, *ENDS, N]
    expected = [
        [int(total) % P for total in vector[begin:stop].astype(object) @ wq[begin:stop]]
        for begin, stop in pairwise([0, *ENDS, N])
        for vector in group.check_vectors
    ]
    assert group.projections.tolist() == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("column", range(N))
def test_the_slice_of_a_wrong_column_is_named(mode: str, column: int) -> None:
    groups, weights = sliced(ENDS)
    error = failure(mode, groups, weights, partial(add, places=[(2, column)], errors=[1]))
    assert isinstance(error, ProductMismatch)
    assert (error.row, error.part) == (2, int(np.searchsorted(ENDS, column, side="right")))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("column", [0, 6, 7, 8, 19, 20, N - 1])
def test_the_slice_of_a_number_out_of_range_is_named(mode: str, column: int) -> None:
    def out_of_range(y: Array) -> None:
        y[1, column] += np.uint32(P)

    error = failure(mode, *sliced(ENDS), out_of_range)
    assert isinstance(error, ReplyRangeError)
    assert (error.row, error.part) == (1, int(np.searchsorted(ENDS, column, side="right")))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("columns", [(0, 23), (6, 7), (7, 8), (19, 20)])
def test_errors_that_cancel_over_all_slices_are_found(mode: str, columns: tuple[int, int]) -> None:
    """By whoever knows the one check vector: v · (y + e) is v · y, and that of neither slice is what it has to be."""
    groups, weights = sliced(ENDS, checks=1)
    (vector,) = groups[KEY].check_vectors
    here, there = (int(vector[column]) for column in columns)
    errors = [12_345, -12_345 * here * pow(there, -1, P) % P]
    assert (errors[0] * here + errors[1] * there) % P == 0
    error = failure(mode, groups, weights, partial(add, places=[(1, column) for column in columns], errors=errors))
    assert (error.row, error.part) == (1, int(np.searchsorted(ENDS, columns[0], side="right")))  # the first


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("place", "part"), [((0, 0), 0), ((999, 299), 0), ((17, 300), 1), ((512, 999), 2)])
def test_one_wrong_element_of_a_million(mode: str, place: tuple[int, int], part: int) -> None:
    groups, weights = sliced((300, 700), columns=1000, inner=16)
    error = failure(mode, groups, weights, partial(add, places=[place], errors=[P - 1]), rows=1000)
    assert (error.row, error.part) == (place[0], part)


def test_as_many_slices_as_there_may_be() -> None:
    """The last of 31: what a verdict has room for."""
    groups, weights = sliced(range(1, 31), columns=31)
    error = failure("masked", groups, weights, partial(add, places=[(0, 30)], errors=[5]))
    assert (error.row, error.part) == (0, 30)


def test_products_of_pads_are_checked_whole() -> None:
    for ends in ((), ENDS):
        groups, weights = sliced(ends)
        x = np.random.default_rng(0).integers(0, P, (5, K), dtype=np.uint32)
        y = (x.astype(np.int64) @ weights[KEY].numpy().astype(np.int64).T % P).astype(np.uint32)
        groups[KEY].check_products(x, y)
        for column in range(N):
            wrong = y.copy()
            add(wrong, [(3, column)], [1])
            with pytest.raises(ProductMismatch) as caught:
                groups[KEY].check_products(x, wrong)
            assert caught.value.row is None  # it is about no worker


def test_forgotten_slices_accept_nothing() -> None:
    groups, weights = sliced(ENDS)
    linears = make_linears("verified", HonestConnection(weights), groups)
    pending = linears.start(KEY, some_input(1))
    groups[KEY].forget()
    with pytest.raises(ProductMismatch):
        pending.wait()
