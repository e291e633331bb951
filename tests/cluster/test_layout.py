"""Options make a layout that is one model, with numbers that stay as they are when replicas come and go."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp.checkpoint.synthetic import SHAPES
from tsqp.cluster.layout import Layout, layout_of
from tsqp.config.shard import Shard
from tsqp.errors import OptionError

TINY = SHAPES["tiny"]  # two layers
counts = st.integers(1, 4)


@given(st.integers(1, 3), counts, counts)
def test_columns_layers_and_replicas_make_so_many_workers(layers: int, columns: int, replicas: int) -> None:
    made = layout_of(TINY, layers=layers, columns=columns, replicas=replicas)
    assert (len(made.shards), made.workers) == (layers * columns, layers * columns * replicas)
    assert layout_of(TINY, layers=layers, columns=columns, replicas=replicas, workers=made.workers) == made
    assert layout_of(TINY, layers=layers, columns=columns, workers=made.workers) == made
    assert layout_of(TINY, layers=layers, replicas=replicas, workers=made.workers) == made
    assert layout_of(TINY, shards=made.shards, workers=made.workers) == made


def test_workers_alone_are_columns_and_nothing_is_one_worker() -> None:
    assert layout_of(TINY, workers=2) == Layout(("0..3/0..1of2", "0..3/1..2of2"), 1)
    assert layout_of(TINY) == Layout(("0..3",), 1)
    assert layout_of(TINY, replicas=3) == Layout(("0..3",), 3)
    assert layout_of(TINY, shards=["2..3", "0..2"], replicas=2) == Layout(("0..2", "2..3"), 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"workers": 0}, "--workers must be at least 1, not 0"),
        ({"replicas": -1}, "--replicas must be at least 1"),
        ({"workers": 3, "layers": 2}, "--workers 3: give a multiple of 2"),
        ({"workers": 5, "columns": 2}, "--workers 5: give a multiple of 2"),
        ({"workers": 6, "columns": 2, "replicas": 2}, "--workers 6: 2 shards with 2 workers each are 4"),
        ({"layers": 4}, "--layers 4: the model has 2 layers"),
        ({"columns": 1000}, "no output feature"),
        ({"workers": 32}, r"layers 0 to 2 are divided into 32 shards of columns; the most is 31: .*--replicas"),
        ({"columns": 32, "replicas": 2}, "the most is 31"),
        ({"shards": [f"0..3/{part}..{part + 1}of32" for part in range(32)]}, "the most is 31"),
        ({"columns": 2, "replicas": 2049}, "4098 workers are more"),
        ({"shards": ["0..2"]}, "nobody holds the LM head"),
        ({"shards": ["0..3", "0..3"]}, "names a shard twice"),
        ({"shards": ["0..3"], "columns": 2}, "leave out --columns"),
        ({"shards": ["x"]}, "not a shard"),
        ({"shards": ["0..4"]}, "layers"),
    ],
)
def test_what_is_no_model_or_no_whole_number_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        layout_of(TINY, **options)  # type: ignore[arg-type]


@given(counts, counts, counts)
def test_more_replicas_leave_the_numbers_that_are_there(shards: int, few: int, more: int) -> None:
    before = Layout(tuple(str(Shard(0, 3, part, part + 1, shards)) for part in range(shards)), few)
    after = before.with_replicas(few + more)
    assert [after.shard_of(number) for number in range(before.workers)] == [
        before.shard_of(number) for number in range(before.workers)
    ]
    assert after.with_workers(before.workers) == before
    new = [number for group in after.groups(before.workers) for number in group]
    assert sorted(new) == list(range(before.workers, after.workers))


@given(st.integers(1, 4), st.integers(2, 4))
def test_the_replicas_of_a_shard_are_one_group_to_be_spread(shards: int, replicas: int) -> None:
    layout = Layout(tuple(str(Shard(0, 3, part, part + 1, shards)) for part in range(shards)), replicas)
    groups = layout.groups()
    assert len(groups) == shards
    assert all(len(group) == replicas and len({layout.shard_of(number) for number in group}) == 1 for group in groups)


def test_without_replicas_the_whole_team_is_a_group() -> None:
    layout = layout_of(TINY, workers=3)
    assert layout.groups() == [(0, 1, 2)]
    assert layout.groups(3) == []
    bounds = [Shard.parse(text) for text in layout.shards]
    assert all(left.stop == right.begin for left, right in pairwise(bounds))


def test_a_number_of_workers_that_is_no_multiple_is_refused() -> None:
    layout = layout_of(TINY, workers=2)
    with pytest.raises(OptionError, match="--workers 3: give a multiple of 2"):
        layout.with_workers(3)
    with pytest.raises(OptionError, match="--replicas must be at least 1"):
        layout.with_replicas(0)
