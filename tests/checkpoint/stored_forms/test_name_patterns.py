"""A pattern of a checkpoint's configuration is matched in bounded time, or refused."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tsqp.checkpoint.stored_forms import stored_form
from tsqp.checkpoint.stored_forms.name_patterns import MAX_WAYS, check_pattern, ways
from tsqp.errors import CorruptCheckpoint, UnsupportedModel

from .references import INT4, ct_config

USUAL = [
    r".*\.up_proj$",
    r".*lm_head",
    r"^(?!.*lm_head).*$",
    r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
    r".*layers\.\d+\.(mlp|self_attn)\..*_proj.*",
    r".*layers\.(" + "|".join(map(str, range(80))) + r")\.(self_attn|mlp)\..*",
    r"(?i:vision_tower)(\.base|\.head)?",
    r"a{2}b{0,3}(cd)*",
    r"(\w)x\1",
    r"",
]
SLOW = [
    r"([\w.]+)+!",
    r"(a|b.)*!",
    r"(?:(?:x?)y)+!",
    r"(?:a{2}){1,9}",
    r".*.*.*.*.*!",
    r"(.|.a)" * 30 + "!",
    r"(?:(?:a|bc)(?:d|ef)){3}",
    r"(?=([\w.]+)+!)",
    r"(){4000000000}",
    r"(?>(a+)+)!",
    r"((a+)+)++!",
    r"(a)?(?(1)(b+)+|c)!",
]


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns_are_taken(pattern: str) -> None:
    check_pattern(pattern, "config.json")


@pytest.mark.parametrize("pattern", SLOW)
def test_patterns_that_can_take_years_are_refused(pattern: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"config\.json: .* can take too long to match") as refused:
        check_pattern(pattern, "config.json")
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("place", ["ignore", "targets"])
def test_they_are_refused_when_the_configuration_is_read(place: str) -> None:
    config: dict[str, Any] = ct_config("pack-quantized", INT4)
    (config if place == "ignore" else config["config_groups"]["group_0"])[place] = [r"re:([\w.]+)+!"]
    with pytest.raises(UnsupportedModel, match="can take too long"):
        stored_form({"quantization_config": config}, "config.json")


@pytest.mark.parametrize("pattern", ["(", "a{2,1}", r"\1", "(" * 5000, "(?P<x>a"])
def test_what_is_no_pattern_is_corrupt(pattern: str) -> None:
    with pytest.raises(CorruptCheckpoint, match="is no pattern"):
        check_pattern(pattern, "config.json")


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        *[("abc", 1), ("a?", 2), (".*", 40), (".{3}", 1), ("a{1,3}", 3)],
        *[("(ab|cd)x", 2), ("(ab|c*)", 41), (".*(ab|cd)?", 120), (".*" * 5000, float("inf"))],
    ],
)
def test_ways(pattern: str, count: int) -> None:
    assert ways(pattern) == count


def test_the_slowest_that_is_taken_ends() -> None:
    slowest = r".*.*.*(?:.|..)(?:.|..)(?:.|..)(?:.|..)(?:.|..)(?:.|..)(?:.|..)(?:.|..)!"
    assert MAX_WAYS / 2 < ways(slowest) <= MAX_WAYS
    assert re.match(slowest, "model.layers.1023.self_attn.q_proj") is None
