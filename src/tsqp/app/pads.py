"""How much memory pads take, and a bar while they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

from tsqp.app.guard_options import GuardOptions
from tsqp.errors import OptionError
from tsqp.spec.groups import linear_groups
from tsqp.spec.model import ModelSpec


def row_bytes(spec: ModelSpec, *, answer: bool) -> int:
    """Memory of what is ready for one token: of a prompt, or of an answer, which needs the LM head too."""
    groups = linear_groups(spec)
    head = groups.pop("lm_head")
    layer = sum(group.out_features for group in groups.values())
    return 4 * (spec.num_layers * layer + (head.out_features if answer else 0))


def pool_bytes(spec: ModelSpec, tokens: int) -> int:
    """Memory of a pool that holds pads for ``tokens`` tokens."""
    from tsqp.arith.expand import BLOCK_ROWS
    from tsqp.trusted.filler import held_bytes

    return held_bytes(spec, -(-tokens // BLOCK_ROWS))


def check_pool(spec: ModelSpec, options: GuardOptions) -> None:
    """Raises OptionError for a pool that stays empty in a run that does not wait for pads."""
    from tsqp.trusted.filler import targets

    if options.pads_empty == "refuse" and not any(targets(spec, options.pads_ahead, options.pad_memory).values()):
        raise OptionError(
            f"pads_empty is refuse, and the pool can hold no pads: allow pads_ahead 1 or more and pad_memory "
            f"{pool_bytes(spec, 1)} bytes or more, or choose pads_empty wait"
        )


@contextmanager
def pads_bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal that appears with the first report of blocks ready and blocks wanted, and goes at the end."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("making pads", total=None, visible=False)
        yield lambda ready, wanted: bar.update(task, completed=ready, total=wanted, visible=True)
