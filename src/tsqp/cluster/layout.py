"""How many workers hold a model, and which shard each of them has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tsqp.config.model import ModelConfig
from tsqp.config.shard import Shard, check_tiling, check_within, even_shards
from tsqp.config.tiling import Tiling
from tsqp.errors import OptionError

MOST_WORKERS = 4096  # that a roster has


@dataclass(frozen=True)
class Layout:
    """``shards``: those that make up the model once. ``replicas``: the workers of each.

    Workers are numbered: ``number = replica · len(shards) + place of the shard``, so that more replicas leave the
    numbers that are there as they are.
    """

    shards: tuple[str, ...]
    replicas: int

    @property
    def workers(self) -> int:
        return self.replicas * len(self.shards)

    def shard_of(self, number: int) -> str:
        return self.shards[number % len(self.shards)]

    def with_replicas(self, replicas: int) -> Layout:
        """The same shards, with another number of workers for each. Raises OptionError."""
        _at_least_one("--replicas", replicas)
        return _bounded(replace(self, replicas=replicas))

    def with_workers(self, workers: int) -> Layout:
        """The same shards on so many workers in all. Raises OptionError where that is no whole number for each."""
        _at_least_one("--workers", workers)
        if workers % len(self.shards):
            raise OptionError(f"--workers {workers}: give a multiple of {len(self.shards)}, the number of shards")
        return self.with_replicas(workers // len(self.shards))

    def groups(self, present: int = 0) -> list[tuple[int, ...]]:
        """The workers from number ``present`` on, as groups whose members are to be on different nodes.

        Replicas of one shard are a group, because a node that is lost must not take all of them. Where there is one
        worker for each shard, all of them are a group, so that the nodes share the work.
        """
        numbers = range(present, self.workers)
        if self.replicas == 1:
            return [tuple(numbers)] if numbers else []
        count = len(self.shards)
        found = [tuple(number for number in numbers if number % count == place) for place in range(count)]
        return [group for group in found if group]


def layout_of(
    config: ModelConfig,
    *,
    workers: int | None = None,
    columns: int | None = None,
    layers: int | None = None,
    replicas: int | None = None,
    shards: Sequence[str] = (),
) -> Layout:
    """The layout that options ask for. Raises OptionError for what is no model, or no whole number of workers."""
    for flag, value in (("workers", workers), ("columns", columns), ("layers", layers), ("replicas", replicas)):
        if value is not None:
            _at_least_one(f"--{flag}", value)
    if shards:
        if columns is not None or layers is not None:
            raise OptionError("--shard says what each worker holds: leave out --columns and --layers")
        given = [Shard.parse(text) for text in shards]
        if len(set(given)) < len(given):
            raise OptionError("--shard names a shard twice: --replicas says how many workers hold each")
        tiles = check_tiling(given, config)
    else:
        columns, layers, replicas = _divided(workers, columns, layers, replicas)
        tiles = even_shards(config, layers, columns)
    for shard in tiles:
        check_within(shard, config)
    _check_columns(tiles, config)
    layout = Layout(tuple(map(str, tiles)), 1)
    if replicas is None:
        return layout if workers is None else layout.with_workers(workers)
    layout = layout.with_replicas(replicas)
    if workers not in (None, layout.workers):
        raise OptionError(
            f"--workers {workers}: {len(tiles)} shards with {replicas} workers each are {layout.workers} workers"
        )
    return layout


def _divided(
    workers: int | None, columns: int | None, layers: int | None, replicas: int | None
) -> tuple[int, int, int | None]:
    """Columns, layers and replicas: ``workers`` alone is that many columns."""
    layers = layers or 1
    if columns is None:
        others = layers * (replicas or 1)
        if workers is not None and workers % others:
            raise OptionError(
                f"--workers {workers}: give a multiple of {others}, which --layers and --replicas ask for"
            )
        columns = 1 if workers is None else workers // others
        replicas = replicas or 1
    return columns, layers, replicas


def _check_columns(tiles: Sequence[Shard], config: ModelConfig) -> None:
    """Raises OptionError where the private modes could not use them: a group has few slices at most."""
    try:
        Tiling(tiles, config)
    except OptionError as error:
        raise OptionError(f"{error} (--layers, --replicas)") from None


def _at_least_one(flag: str, value: int) -> None:
    if value < 1:
        raise OptionError(f"{flag} must be at least 1, not {value}")


def _bounded(layout: Layout) -> Layout:
    if layout.workers > MOST_WORKERS:
        raise OptionError(f"{layout.workers} workers are more than a roster has, {MOST_WORKERS}")
    return layout
