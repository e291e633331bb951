"""What one of several workers holds: some layers, and some output features of each of their linear groups.

``docs/cluster.md`` §1. The LM head counts as the layer after the last.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import gcd
from typing import Final

from tsqp.config.groups import GroupKey, LinearGroup, group_keys, linear_groups
from tsqp.config.model import ModelConfig
from tsqp.errors import OptionError

MOST_PARTS = 1024  # that output features are divided into
_LAYER, _PART = r"(0|[1-9][0-9]{0,4})", r"(0|[1-9][0-9]{0,3})"
PATTERN: Final = rf"^{_LAYER}\.\.{_LAYER}(/{_PART}\.\.{_PART}of{_PART})?\Z"  # $ would allow a line's end after it
MOST_TEXT: Final = 40  # characters: more than any text of the pattern has


@dataclass(frozen=True, order=True)
class Shard:
    """Layers ``first`` to before ``end``; of each group, parts ``begin`` to before ``stop`` of ``of`` equal ones.

    Kept in lowest terms, so that shards with the same columns are equal: 0..2of4 is 0..1of2. Raises OptionError for
    what is empty.
    """

    first: int
    end: int
    begin: int = 0
    stop: int = 1
    of: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.first < self.end and 0 <= self.begin < self.stop <= self.of <= MOST_PARTS):
            raise OptionError(f"shard {self} is empty, or has parts that do not exist")
        common = gcd(self.begin, self.stop, self.of)
        for name in ("begin", "stop", "of"):
            object.__setattr__(self, name, getattr(self, name) // common)

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From ``0..17/0..1of2``. Raises OptionError."""
        found = re.fullmatch(PATTERN, text)
        if found is None:
            raise OptionError(f"{text[:60]!a} is not a shard: write it as 0..17 or 0..17/0..1of2")
        first, end, columns, begin, stop, of = found.groups()
        if columns is None:
            return cls(int(first), int(end))
        return cls(int(first), int(end), int(begin), int(stop), int(of))

    def __str__(self) -> str:
        layers = f"{self.first}..{self.end}"
        return layers if self.of == 1 else f"{layers}/{self.begin}..{self.stop}of{self.of}"

    def layers(self, config: ModelConfig) -> range:
        """The decoder layers among its layers."""
        return range(self.first, min(self.end, config.num_layers))

    def has(self, key: GroupKey, config: ModelConfig) -> bool:
        """Whether some of the group's output features are here."""
        layer = config.num_layers if key[1] is None else key[1]
        return self.first <= layer < self.end

    def keys(self, config: ModelConfig) -> list[GroupKey]:
        """The groups that it has, layer by layer."""
        return [key for key in group_keys(config) if self.has(key, config)]

    def groups(self, config: ModelConfig) -> list[LinearGroup]:
        """The groups that it has in some layer, whole, in the order of ``linear_groups``."""
        held = {name for name, _ in self.keys(config)}
        return [group for name, group in linear_groups(config).items() if name in held]

    def width(self, group: LinearGroup) -> int:
        """How many of a group's output features it has."""
        begin, stop = self.columns(group.out_features)
        return stop - begin

    def columns(self, out_features: int) -> tuple[int, int]:
        """First and past-the-last output feature, of a group of so many."""
        return out_features * self.begin // self.of, out_features * self.stop // self.of


def whole(config: ModelConfig) -> Shard:
    """The shard of a worker that holds all of a model."""
    return Shard(0, config.num_layers + 1)


def said(shard: Shard, config: ModelConfig) -> str | None:
    """A shard as a worker says it: None for all of the model, else its text in lowest terms."""
    return None if shard == whole(config) else str(shard)


def even_shards(config: ModelConfig, layers: int, columns: int) -> list[Shard]:
    """``layers`` sets of layers times ``columns`` parts of the output features. Raises OptionError.

    The LM head counts as one layer.
    """
    total = config.num_layers + 1
    if layers > total:
        raise OptionError(f"--layers {layers}: the model has {config.num_layers} layers and an LM head")
    bounds = [total * index // layers for index in range(layers + 1)]
    return [Shard(first, end, part, part + 1, columns) for first, end in pairwise(bounds) for part in range(columns)]


def check_within(shard: Shard, config: ModelConfig) -> None:
    """Raises OptionError where the model has no such layers, or one of their groups too few output features."""
    if shard.end > config.num_layers + 1:
        raise OptionError(
            f"shard {shard} has layers up to {shard.end - 1}; the model has 0 to {config.num_layers - 1}, and "
            f"{config.num_layers} stands for the LM head"
        )
    for group in shard.groups(config):
        if shard.width(group) == 0:
            raise OptionError(f"shard {shard} has no output feature of {group.name}, which has {group.out_features}")


def check_tiling(shards: Sequence[Shard], config: ModelConfig) -> list[Shard]:
    """The different shards, in order, of workers that together hold a model once. Raises OptionError.

    Replicas, whose shards are the same, count once.
    """
    distinct = sorted(set(shards), key=lambda shard: (shard.first, shard.end, shard.begin / shard.of))
    layer, last = 0, config.num_layers  # the first layer that nobody holds so far; the LM head's
    for (first, end), members in groupby(distinct, key=lambda shard: (shard.first, shard.end)):
        if first > layer:
            raise _no_model(f"nobody holds layers {layer} to {first - 1}")
        if first < layer:
            raise _no_model(f"layer {first} is held twice")
        if end > last + 1:
            raise _no_model(f"there are no layers after {last}, the LM head, and somebody holds up to {end - 1}")
        _check_columns(list(members))
        layer = end
    if layer <= last:
        raise _no_model("nobody holds the LM head" if layer == last else f"nobody holds layers {layer} to {last}")
    return distinct


def _check_columns(shards: Sequence[Shard]) -> None:
    """Raises OptionError unless shards of the same layers, in order, have each column once."""
    held, of = 0, 1  # up to this fraction
    for shard in shards:
        here, there = shard.begin * of, held * shard.of
        if here != there:
            what = "nobody holds some columns" if here > there else "some columns are held twice"
            raise _no_model(f"{what} of layers {shard.first} to {shard.end - 1}: look at {shard}")
        held, of = shard.stop, shard.of
    if held != of:
        raise _no_model(f"nobody holds the last columns of layers {shards[0].first} to {shards[0].end - 1}")


def _no_model(what: str) -> OptionError:
    return OptionError(f"the workers do not make one model: {what}")
