"""How much memory pads take, what is refused for the lack of them, and what is shown while they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress

from tsqp.api.guard_config import GuardConfig
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


def row_bytes(spec: ModelConfig, *, answer: bool) -> int:
    """Memory of what is ready for one token: of a prompt, or of an answer, which needs the LM head too."""
    groups = linear_groups(spec)
    head = groups.pop("lm_head")
    layer = sum(group.out_features for group in groups.values())
    return 4 * (spec.num_layers * layer + (head.out_features if answer else 0))


def pool_bytes(spec: ModelConfig, tokens: int) -> int:
    """Memory of a pool that holds pads for ``tokens`` tokens."""
    from tsqp.arith.expand import BLOCK_ROWS
    from tsqp.trusted.filler import held_bytes

    return held_bytes(spec, -(-tokens // BLOCK_ROWS))


def check_pool(spec: ModelConfig, options: GuardConfig) -> None:
    """Raises OptionError for a pool that stays empty in a run that does not wait for pads."""
    from tsqp.trusted.filler import targets

    if options.pads_empty == "refuse" and not any(targets(spec, options.pads_ahead, options.pad_memory).values()):
        raise OptionError(
            f"--pads-empty is refuse, and the pool can hold no pads: give --pads-ahead 1 or more and --pad-memory "
            f"{pool_bytes(spec, 1)} or more, or choose --pads-empty wait"
        )


def check_prompts(tokens: int, options: GuardConfig, filler: PadFiller) -> None:
    """Raises PadsExhausted for prompts of more tokens than the pool has pads for, in a run that does not wait."""
    if options.pads_empty == "refuse" and tokens > filler.ahead:
        raise PadsExhausted(
            f"--pads-empty is refuse, and the pool holds pads for {filler.ahead} of the {tokens} tokens asked for: "
            "raise --pads-ahead or --pad-memory, or choose --pads-empty wait"
        )


def ahead_text(spec: ModelConfig, options: GuardConfig, ahead: int) -> str:
    """Tokens whose pads are kept ready; where memory allows fewer than were asked for, that too."""
    if ahead >= options.pads_ahead:
        return f"{ahead} tokens ahead"
    needed = decimal(pool_bytes(spec, options.pads_ahead))
    given = decimal(options.pad_memory)
    return f"{ahead} of {options.pads_ahead} tokens ahead (--pad-memory {given}, {needed} needed)"


def fill(filler: PadFiller, spec: ModelConfig, progress: FillingProgress | None) -> None:
    """Fill the pool now, and report it from the first block to the last. Raises every error of the pads' source."""
    tokens, wanted = filler.ahead, sum(filler.blocks.values())
    size = pool_bytes(spec, tokens)

    def report(ready: int, wanted: int) -> None:
        if progress is not None:
            progress(Filling(ready, wanted, tokens, size))

    if wanted:
        report(0, wanted)
    filler.fill(report)


@contextmanager
def pads_bar(console: Console) -> Iterator[FillingProgress]:
    """What shows a pool being filled: on a terminal a bar that goes at the end, elsewhere a first and a last line."""
    if not console.is_terminal:
        yield partial(_say, console)
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("making pads", total=None, visible=False)
        yield lambda filling: bar.update(task, completed=filling.ready, total=filling.wanted, visible=True)


def _say(console: Console, filling: Filling) -> None:
    if filling.ready == 0:
        console.print(f"filling pads for {filling.tokens} tokens, {decimal(filling.size)}", style="dim", soft_wrap=True)
    if filling.ready == filling.wanted:
        console.print(f"pads for {filling.tokens} tokens are ready", style="dim", soft_wrap=True)
