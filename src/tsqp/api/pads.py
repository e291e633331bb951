"""How much memory pads take, what is refused for the lack of them, and what is told while they are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from tsqp.api.config import GuardConfig
from tsqp.config.groups import GroupKey, linear_groups
from tsqp.config.model import ModelConfig
from tsqp.errors import OptionError

if TYPE_CHECKING:
    from tsqp.trusted.filler import PadFiller


class Filling(NamedTuple):
    """How far the filling of a pool is: blocks ``ready`` of those ``wanted``, for ``tokens`` tokens, ``size`` bytes."""

    ready: int
    wanted: int
    tokens: int
    size: int


FillingProgress = Callable[[Filling], None]

FIELDS = ("guard.pads_empty", "guard.pads_ahead", "guard.pad_memory")  # that errors about an empty pool name


def row_bytes(config: ModelConfig, *, answer: bool) -> int:
    """Memory of what is ready for one token: of a prompt, or of an answer, which needs the LM head too."""
    groups = linear_groups(config)
    head = groups.pop("lm_head")
    layer = sum(group.out_features for group in groups.values())
    return 4 * (config.num_layers * layer + (head.out_features if answer else 0))


def pool_bytes(config: ModelConfig, tokens: int, *, whole_answers: bool = False) -> int:
    """Memory of a pool that holds pads for ``tokens`` tokens; of answers too, for ``whole_answers``."""
    from tsqp.arith.expand import BLOCK_ROWS
    from tsqp.trusted.filler import held_bytes

    return held_bytes(config, -(-tokens // BLOCK_ROWS), whole_answers=whole_answers)


def pool_targets(config: ModelConfig, options: GuardConfig) -> dict[GroupKey, int]:
    """Blocks to keep ready of each group.

    A run that refuses to make missing pads has to know of each answer that its pads are there.
    """
    from tsqp.trusted.filler import targets

    whole_answers = options.pads_empty == "refuse"
    return targets(config, options.pads_ahead, options.pad_memory, whole_answers=whole_answers)


def check_pool(config: ModelConfig, options: GuardConfig) -> None:
    """Raises OptionError for a pool that stays empty in a run that does not wait for pads."""
    if options.pads_empty == "refuse" and not any(pool_targets(config, options).values()):
        raise OptionError(
            f"guard.pads_empty is refuse, and the pool can hold no pads: give 1 or more as guard.pads_ahead and "
            f"{pool_bytes(config, 1)} or more as guard.pad_memory, or choose wait",
            fields=FIELDS,
        )


def fill(filler: PadFiller, config: ModelConfig, progress: FillingProgress | None) -> None:
    """Fill the pool now, and report it from the first block to the last. Raises every error of the pads' source."""
    from tsqp.trusted.filler import block_bytes

    tokens, wanted, groups = filler.ahead, sum(filler.blocks.values()), linear_groups(config)
    size = sum(count * block_bytes(groups[key[0]].out_features) for key, count in filler.blocks.items())

    def report(ready: int, wanted: int) -> None:
        if progress is not None:
            progress(Filling(ready, wanted, tokens, size))

    if wanted:
        report(0, wanted)
    filler.fill(report)
