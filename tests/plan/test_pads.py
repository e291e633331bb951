"""Pads of one token: what the trusted side does of them, what goes on beside passes, and what lasts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.plan.numbers import SHM, TINY, WEIGHTS_LAYER, X_LAYER, Y_LAYER, constants
from tsqp.bench.probe import NOTHING
from tsqp.plan.cluster import Link, Setting
from tsqp.plan.constants import ProductTimes
from tsqp.plan.pads import PadTimes, pad_times

X, Y, WEIGHTS = 2 * X_LAYER + 64, 2 * Y_LAYER + 512, 2 * WEIGHTS_LAYER + 64 * 512
DEALT = Setting(TINY, "masked", SHM, 2, "cpu", dealers=2)
seconds = st.floats(0, 10)


def test_pads_are_made_here() -> None:
    known = constants(NOTHING, pad_weight_s=3.0, pad_number_s=5.0)
    here = pad_times(known, Setting(TINY, "masked", SHM, 2, "cpu"))
    assert here.own == pytest.approx((3 * WEIGHTS + 5 * (X + Y)) / 2)
    assert (here.by_themselves, here.beside) == (here.own, 0)


def test_a_prompt_has_one_row_of_the_head() -> None:
    known = constants(NOTHING, pad_weight_s=3.0, pad_number_s=5.0)
    here = pad_times(known, Setting(TINY, "masked", SHM, 2, "cpu"), rows=32)
    layers, head = 3 * 2 * WEIGHTS_LAYER + 5 * 2 * (X_LAYER + Y_LAYER), 3 * 64 * 512 + 5 * (64 + 512)
    assert here.own == pytest.approx((32 * layers + head) / 2)
    known = constants(ProductTimes(0.0, 256.0, 1.0, 1.0), pad_number_s=5.0)
    dealt = pad_times(known, replace(DEALT, link=Link(1e-3)), rows=32)
    assert dealt.own == pytest.approx(5 * (32 * 2 * (X_LAYER + Y_LAYER) + 64 + 512) / 2)
    assert dealt.made == pytest.approx((32 * 2 * WEIGHTS_LAYER + 64 * 512) * 2 / 2)
    assert dealt.crossed == pytest.approx(4 * (32 * 2 * Y_LAYER + 512) / 1e-3)


def test_dealers_multiply_and_the_trusted_side_expands_and_checks() -> None:
    known = constants(ProductTimes(0.0, 256.0, 1.0, 1.0), pad_weight_s=3.0, pad_number_s=5.0)
    found = pad_times(known, DEALT)
    assert found.own == pytest.approx(5 * (X + Y) / 2)
    assert found.made == pytest.approx(WEIGHTS * 2 / 2)  # a weight is read once for 256 rows
    assert found.crossed == 0


@pytest.mark.parametrize("plain", [False, True])
def test_what_dealers_send_shares_the_link_and_is_enciphered(plain: bool) -> None:
    """With keys, whatever the workers' lines have: keys of pads cross there."""
    known = constants(NOTHING, byte_s=1.0, plain_byte_s=100.0)
    found = pad_times(known, Setting(TINY, "masked", Link(1e-3, plain=plain), 2, "cpu", dealers=2))
    assert found.crossed == pytest.approx(4 * Y / 1e-3 + 4 * Y / 2)


def test_what_lasts_is_the_pass_and_its_own_work_or_the_slowest_beside_them() -> None:
    assert PadTimes(2.0, 4.0, 3.0).lasting(1.0) == 4.0
    assert PadTimes(2.0, 4.0, 3.0).lasting(3.0) == 5.0
    assert PadTimes(2.0, 3.0, 4.0).lasting(1.5) == 4.0
    assert PadTimes(2.0, 3.0, 4.0).by_themselves == 4.0
    assert PadTimes(5.0, 3.0, 4.0).by_themselves == 5.0


def test_pads_are_most_of_a_token_where_they_take_longer_than_its_pass() -> None:
    assert PadTimes(2.0).bind(1.0)
    assert not PadTimes(1.0, 2.0, 2.0).bind(1.0)  # beside the pass and its checks
    assert PadTimes(1.0, 2.5, 0.0).bind(1.0)
    assert PadTimes(1.0, 0.0, 2.5).bind(1.0)


@given(seconds, seconds, seconds, seconds)
def test_dealers_never_make_the_trusted_side_faster_than_its_pass_and_its_checks(
    own: float, made: float, crossed: float, token_s: float
) -> None:
    found = PadTimes(own, made, crossed).lasting(token_s)
    assert found >= token_s + own
    assert found >= max(made, crossed)
    assert found in (token_s + own, made, crossed)
