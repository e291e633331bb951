"""How a model is divided: whose slice of a group is where."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tsqp.checkpoint import open_checkpoint
from tsqp.config.groups import group_keys, linear_groups
from tsqp.config.shard import Shard
from tsqp.config.tiling import MOST_SLICES, Tiling
from tsqp.errors import OptionError

CONFIG = open_checkpoint("synthetic:tiny").config  # two layers


def tiling(*shards: str) -> Tiling:
    return Tiling([Shard.parse(shard) for shard in shards], CONFIG)


def test_slices_lie_side_by_side_in_the_order_of_their_columns() -> None:
    found = tiling("1..3/1..3of3", "0..1", "1..3/0..1of3", "1..3/0..1of3")
    assert [str(shard) for shard in found.of(("o", 0))] == ["0..1"]
    assert [str(shard) for shard in found.of(("lm_head", None))] == ["1..3/0..1of3", "1..3/1..3of3"]
    assert found.bounds(("o", 0), 64) == [0, 64]
    assert found.bounds(("down", 1), 64) == [0, 21, 64]
    for key in group_keys(CONFIG):
        features = linear_groups(CONFIG)[key[0]].out_features
        assert [shard.columns(features) for shard in found.of(key)] == list(pairwise(found.bounds(key, features)))


def test_tilings_of_the_same_shards_are_equal() -> None:
    one, other = tiling("0..3/0..1of2", "0..3/1..2of2"), tiling("0..3/2..4of4", "0..3/0..2of4", "0..3/0..1of2")
    assert one == other
    assert hash(one) == hash(other)
    assert one != tiling("0..3")
    assert one != None  # noqa: E711  (as who has none asks)


def test_more_slices_than_a_verdict_can_name_are_refused_in_one_line() -> None:
    def parts(count: int) -> list[str]:
        return [f"0..3/{part}..{part + 1}of{count}" for part in range(count)]

    assert len(tiling(*parts(MOST_SLICES)).of(("o", 0))) == MOST_SLICES
    with pytest.raises(OptionError, match=r"layers 0 to 2 are divided into 32 shards of columns; the most is 31"):
        tiling(*parts(MOST_SLICES + 1))


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(OptionError, match="nobody holds"):
        tiling("0..3/0..1of2")
