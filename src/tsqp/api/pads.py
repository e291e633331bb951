"""How much memory pads take, what is refused for the lack of them, and what is told while they are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from tsqp.api.config import GuardConfig
from tsqp.config.groups import linear_groups
from tsqp.config.model import ModelConfig
from tsqp.errors import OptionError, PadsExhausted

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


def pool_bytes(config: ModelConfig, tokens: int) -> int:
    """Memory of a pool that holds pads for ``tokens`` tokens."""
    from tsqp.arith.expand import BLOCK_ROWS
    from tsqp.trusted.filler import held_bytes

    return held_bytes(config, -(-tokens // BLOCK_ROWS))


def check_pool(config: ModelConfig, options: GuardConfig) -> None:
    """Raises OptionError for a pool that stays empty in a run that does not wait for pads."""
    from tsqp.trusted.filler import targets

    if options.pads_empty == "refuse" and not any(targets(config, options.pads_ahead, options.pad_memory).values()):
        raise OptionError(
            f"guard.pads_empty is refuse, and the pool can hold no pads: give 1 or more as guard.pads_ahead and "
            f"{pool_bytes(config, 1)} or more as guard.pad_memory, or choose wait",
            fields=FIELDS,
        )


def check_prompts(tokens: int, options: GuardConfig, filler: PadFiller) -> None:
    """Raises PadsExhausted for prompts of more tokens than the pool has pads for, in a run that does not wait."""
    if options.pads_empty == "refuse" and tokens > filler.ahead:
        raise PadsExhausted(
            f"guard.pads_empty is refuse, and the pool holds pads for {filler.ahead} of the {tokens} tokens asked for: "
            "raise guard.pads_ahead or guard.pad_memory, or choose wait",
            fields=FIELDS,
        )


def fill(filler: PadFiller, config: ModelConfig, progress: FillingProgress | None) -> None:
    """Fill the pool now, and report it from the first block to the last. Raises every error of the pads' source."""
    tokens, wanted = filler.ahead, sum(filler.blocks.values())
    size = pool_bytes(config, tokens)

    def report(ready: int, wanted: int) -> None:
        if progress is not None:
            progress(Filling(ready, wanted, tokens, size))

    if wanted:
        report(0, wanted)
    filler.fill(report)
