"""The worker's options for a shard: what it is, what goes with it, and what does not."""

from __future__ import annotations

import pytest

from tsqp.config.shard import Shard
from tsqp.config.worker_options import parse_worker_options
from tsqp.errors import OptionError


def test_a_shard_is_for_the_field_path() -> None:
    options = parse_worker_options(["--shard", "0..17/0..1of2"])
    assert options.shard == Shard(0, 17, 0, 1, 2)
    assert options.dtype == "field"
    assert parse_worker_options(["--shard=8..17", "--dtype", "field"]).shard == Shard(8, 17)


def test_without_a_shard_nothing_changes() -> None:
    options = parse_worker_options([])
    assert options.shard is None
    assert options.dtype == "auto"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["0..0"], "empty"),
        (["half"], "'half' is not a shard: write it as 0..17 or 0..17/0..1of2"),
        (["0..3", "--dtype", "bfloat16"], "--shard is for the private modes: use --dtype field, not bfloat16"),
        (["0..3", "--dtype", "int8"], "use --dtype field, not int8"),
        (["0..3", "--compile"], "--compile plays no part with --shard"),
        (["0..3", "--listen", "cuda:///x", "--device", "cuda"], "gives no isolation"),
    ],
)
def test_what_does_not_go_with_a_shard_is_refused_in_one_line(arguments: list[str], words: str) -> None:
    with pytest.raises(OptionError, match=words) as error:
        parse_worker_options(["--shard", *arguments])
    assert "\n" not in str(error.value)
