"""Slices of a group cover its output features once, and nearly equally; parts and products are cut where they are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp.config.groups import LinearGroup, cut
from tsqp.untrusted.paths.slices import UNIT, share, slices


@given(st.data(), st.integers(1, 40))
def test_slices_cover_everything_once(data: st.DataObject, devices: int) -> None:
    features = data.draw(st.integers(devices, 200_000))
    found = slices(features, devices)
    assert [one.first for one in found] == [0, *(one.end for one in found[:-1])]
    assert found[-1].end == features
    assert all(one.end > one.first for one in found)


@given(st.integers(1, 16), st.integers(1, 2_000))
def test_borders_are_those_of_tiles(devices: int, units: int) -> None:
    """Where there are enough: otherwise of the largest power of two that gives each device something."""
    features = UNIT * max(units, devices)
    widths = [one.end - one.first for one in slices(features, devices)]
    assert all(width % UNIT == 0 for width in widths)
    assert max(widths) - min(widths) <= UNIT


def test_small_groups_have_small_units() -> None:
    assert [one.end for one in slices(192, 3)] == [64, 128, 192]
    assert [one.end for one in slices(5, 3)] == [1, 3, 5]
    assert [one.end for one in slices(128_256, 3)] == [42_752, 85_504, 128_256]


@pytest.mark.parametrize(("features", "devices"), [(4, 5), (4, 0)])
def test_what_cannot_be_divided_is_refused(features: int, devices: int) -> None:
    with pytest.raises(ValueError, match=f"{features} output features cannot be divided over {devices} devices"):
        slices(features, devices)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=4), st.data())
def test_shares_of_a_product_are_its_columns(rows: list[int], data: st.DataObject) -> None:
    group = LinearGroup("qkv", 8, tuple((f"part {n}", size) for n, size in enumerate(rows)), bias=False)
    devices = data.draw(st.integers(1, min(9, group.out_features)))
    each = slices(group.out_features, devices)
    for part in (None, *range(len(rows))):
        first, end = group.part_rows(part)
        columns: list[int] = []
        for own in each:
            found, here = share(group, part, own), cut(group, *own)
            columns += range(found.first, found.first + found.width)
            local = here.part_rows(part)  # rows of this device's weights
            assert local[1] - local[0] == found.width
            assert not found.width or own.first + local[0] == first + found.first
        assert columns == list(range(end - first))
