"""Shards: their text, the columns of a tiling, and tilings that are not whole."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tsqp.checkpoint.synthetic import SHAPES
from tsqp.config.groups import GroupKey, group_keys, linear_groups
from tsqp.config.model import ModelConfig
from tsqp.config.shard import (
    MOST_PARTS,
    MOST_TEXT,
    PATTERN,
    Shard,
    check_tiling,
    check_within,
    even_shards,
    said,
    whole,
)
from tsqp.errors import OptionError

TINY = SHAPES["tiny"]  # two layers


def of_layers(count: int) -> ModelConfig:
    return replace(TINY, num_layers=count, windows=(None,) * count)


@st.composite
def shards(draw: st.DrawFn) -> Shard:
    first = draw(st.integers(0, 99_998))
    of = draw(st.integers(1, MOST_PARTS))
    begin = draw(st.integers(0, of - 1))
    return Shard(first, draw(st.integers(first + 1, 99_999)), begin, draw(st.integers(begin + 1, of)), of)


def cuts(end: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    """0 to ``end`` in ranges that follow one another."""
    inner = st.sets(st.integers(1, end - 1), max_size=5) if end > 1 else st.just(set[int]())
    return inner.map(lambda found: list(zip([0, *sorted(found)], [*sorted(found), end], strict=True)))


@st.composite
def columns(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Parts of one, two or more divisions: a half may be written as two quarters."""
    of = draw(st.integers(1, 12))
    finer = [draw(st.integers(1, 3)) for _ in range(of)]
    return [
        (begin * scale, stop * scale, of * scale) for (begin, stop), scale in zip(draw(cuts(of)), finer, strict=False)
    ]


@st.composite
def tilings(draw: st.DrawFn) -> tuple[ModelConfig, list[Shard]]:
    """A model and the shards that make it up, in any order."""
    config = of_layers(draw(st.integers(1, 8)))
    found = [Shard(first, end, *part) for first, end in draw(cuts(config.num_layers + 1)) for part in draw(columns())]
    return config, draw(st.permutations(found))


@given(shards())
def test_a_shard_survives_its_text(shard: Shard) -> None:
    assert Shard.parse(str(shard)) == shard
    assert len(str(shard)) <= MOST_TEXT
    assert re.search(PATTERN, str(shard))


@pytest.mark.parametrize(
    ("text", "shard"),
    [
        ("0..17/0..1of2", Shard(0, 17, 0, 1, 2)),
        ("8..17", Shard(8, 17)),
        ("0..8/1..3of5", Shard(0, 8, 1, 3, 5)),
        ("16..17", Shard(16, 17)),
    ],
)
def test_the_texts_of_the_page(text: str, shard: Shard) -> None:
    assert Shard.parse(text) == shard
    assert str(shard) == text


@pytest.mark.parametrize(("text", "lowest"), [("0..3/2..4of8", "0..3/1..2of4"), ("1..3/0..5of5", "1..3")])
def test_the_same_columns_are_the_same_shard(text: str, lowest: str) -> None:
    assert Shard.parse(text) == Shard.parse(lowest)
    assert hash(Shard.parse(text)) == hash(Shard.parse(lowest))
    assert str(Shard.parse(text)) == lowest


BAD = [
    "",
    "0",
    "0..0",
    "3..2",
    "-1..2",
    "0..2/",
    "0..2/0..1",
    "0..2/1..1of2",
    "0..2/0..3of2",
    "0..2/0..1of0",
    f"0..2/0..1of{MOST_PARTS + 1}",
    "00..2",
    "0..2 ",
    "0..2\n",
    "0..2/0..1of2\n",
    " 0..2",
    "0..١",
    "0..100000",
    "0..2/0..1of2/0..1of2",
]


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_shard_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(OptionError) as error:
        Shard.parse(text)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("text", ["0..2\n", "0..2/0..1of2\n", "x0..2", "0..2x"])
def test_the_pattern_is_of_the_whole_text(text: str) -> None:
    """A decoder of messages searches by it, and does not match all of a text."""
    assert re.search(PATTERN, text) is None


@given(tilings(), st.integers(0, 400))
def test_columns_of_a_tiling_cover_every_group_once(tiling: tuple[ModelConfig, list[Shard]], more: int) -> None:
    config, found = tiling
    features = max(shard.of for shard in found) + more
    held: dict[GroupKey, list[int]] = {key: [] for key in group_keys(config)}
    for shard in check_tiling(found, config):
        begin, stop = shard.columns(features)
        assert begin < stop
        for key in shard.keys(config):
            assert shard.has(key, config)
            held[key] += range(begin, stop)
    assert all(columns == list(range(features)) for columns in held.values())


@given(tilings())
def test_a_tiling_is_accepted_with_any_replicas(tiling: tuple[ModelConfig, list[Shard]]) -> None:
    config, found = tiling
    assert set(check_tiling([*found, *found[:2]], config)) == set(found)
    assert len(check_tiling([*found, *found[:2]], config)) == len(found)


@given(tilings(), st.data())
def test_a_tiling_without_one_of_its_shards_is_refused(
    tiling: tuple[ModelConfig, list[Shard]], data: st.DataObject
) -> None:
    config, found = tiling
    lost = data.draw(st.sampled_from(found))
    with pytest.raises(OptionError, match="nobody holds"):
        check_tiling([shard for shard in found if shard != lost], config)


@given(tilings(), shards(), st.data())
def test_a_tiling_with_one_shard_more_is_refused(
    tiling: tuple[ModelConfig, list[Shard]], other: Shard, data: st.DataObject
) -> None:
    """Another one of the same layers, or of some others that the model has."""
    config, found = tiling
    layers = data.draw(st.sampled_from([(shard.first, shard.end) for shard in found]) | st.just((0, 1)))
    more = replace(other, first=layers[0], end=layers[1])
    assume(more not in found)
    with pytest.raises(OptionError, match="do not make one model"):
        check_tiling([*found, more], config)


@given(tilings(), st.sampled_from(["layers", "columns"]), st.data())
def test_a_tiling_with_a_shard_shifted_is_refused(
    tiling: tuple[ModelConfig, list[Shard]], what: str, data: st.DataObject
) -> None:
    config, found = tiling
    old = data.draw(st.sampled_from(found))
    if what == "layers":
        new = replace(old, first=old.first + 1, end=old.end + 1)
    else:
        new = replace(old, begin=2 * old.begin + 1, stop=2 * old.stop + 1, of=2 * old.of + 1)
    with pytest.raises(OptionError, match="do not make one model"):
        check_tiling([new if shard == old else shard for shard in found], config)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([], "nobody holds layers 0 to 2"),
        (["0..2"], "nobody holds the LM head"),
        (["1..3"], "nobody holds layers 0 to 0"),
        (["0..1", "2..3"], "nobody holds layers 1 to 1"),
        (["0..2", "1..3"], "layer 1 is held twice"),
        (["0..4"], "no layers after 2"),
        (["0..3", "3..4"], "no layers after 2"),
        (["0..3/0..1of2"], "nobody holds the last columns of layers 0 to 2"),
        (["0..3/1..2of2"], "nobody holds some columns of layers 0 to 2"),
        (["0..3/0..1of2", "0..3/1..3of3"], "held twice"),
        (["0..3", "0..3/0..1of2"], "held twice"),
    ],
)
def test_the_first_gap_or_overlap_is_named(texts: list[str], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        check_tiling([Shard.parse(text) for text in texts], TINY)


def test_a_model_has_the_layers_and_features_of_a_shard() -> None:
    for text in ("0..3", "2..3", "0..1/31..32of32", "2..3/0..1of512"):
        check_within(Shard.parse(text), TINY)
    with pytest.raises(OptionError, match="layers up to 3; the model has 0 to 1, and 2 stands for the LM head"):
        check_within(Shard.parse("0..4"), TINY)
    few = linear_groups(TINY)["o"].out_features
    with pytest.raises(OptionError, match=f"no output feature of o, which has {few}"):
        check_within(Shard.parse(f"0..1/0..1of{2 * few}"), TINY)


def test_keys_are_those_of_its_layers_and_the_head_comes_after_them() -> None:
    assert Shard(2, 3).keys(TINY) == [("lm_head", None)]
    assert [group.name for group in Shard(2, 3).groups(TINY)] == ["lm_head"]
    assert list(Shard(2, 3).layers(TINY)) == []
    assert Shard(1, 2).keys(TINY) == [("qkv", 1), ("o", 1), ("gate_up", 1), ("down", 1)]
    assert [group.name for group in Shard(1, 2).groups(TINY)] == ["qkv", "o", "gate_up", "down"]
    assert list(Shard(1, 3).layers(TINY)) == [1]
    assert whole(TINY).keys(TINY) == group_keys(TINY)


def test_all_of_a_model_is_said_by_nothing() -> None:
    assert said(whole(TINY), TINY) is None
    assert said(Shard(0, 3, 0, 5, 5), TINY) is None
    assert said(Shard(0, 2), TINY) == "0..2"
    assert said(Shard(0, 3, 2, 4, 4), TINY) == "0..3/1..2of2"


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 8))
def test_even_shards_are_one_model_and_even(num_layers: int, layers: int, columns: int) -> None:
    config = of_layers(num_layers)
    if layers > num_layers + 1:
        with pytest.raises(OptionError, match="LM head"):
            even_shards(config, layers, columns)
        return
    made = even_shards(config, layers, columns)
    assert len(check_tiling(made, config)) == layers * columns
    heights = {shard.end - shard.first for shard in made}
    assert max(heights) - min(heights) <= 1
