"""How a model is divided among workers: the slices of each linear group, side by side. ``docs/cluster.md`` §1."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from tsqp.config.groups import GroupKey
from tsqp.config.model import ModelConfig
from tsqp.config.shard import Shard, check_tiling
from tsqp.errors import OptionError

MOST_SLICES: Final = 31  # of one group: the guard's verdict on a row names one of them in five bits


class Tiling:
    """Shards that together are all of a model, once. Tilings of the same shards are equal. Raises OptionError."""

    def __init__(self, shards: Iterable[Shard], config: ModelConfig) -> None:
        self._config = config
        self.shards = tuple(check_tiling(list(shards), config))
        for shard in self.shards:
            slices = sum((other.first, other.end) == (shard.first, shard.end) for other in self.shards)
            if slices > MOST_SLICES:
                raise OptionError(
                    f"layers {shard.first} to {shard.end - 1} are divided into {slices} shards of columns; the most is "
                    f"{MOST_SLICES}: give each worker more columns, or fewer layers"
                )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tiling) and self.shards == other.shards

    def __hash__(self) -> int:
        return hash(self.shards)

    def of(self, key: GroupKey) -> list[Shard]:
        """The shards that have the group, in the order of their columns."""
        return [shard for shard in self.shards if shard.has(key, self._config)]

    def bounds(self, key: GroupKey, out_features: int) -> list[int]:
        """Where the slices of a group of so many output features begin, and where the last one ends."""
        return [*(shard.columns(out_features)[0] for shard in self.of(key)), out_features]
