"""From the options of a command to a model that is open, its mode stated first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from tsqp.api.config import RunConfig
from tsqp.api.describe import PLAIN, mode_lines
from tsqp.api.kernel_cache import keeps_none

if TYPE_CHECKING:
    from tsqp.api.llm import LLM
    from tsqp.api.plan import Plan
    from tsqp.trusted.engine.limits import Limits


def open_llm(
    run: RunConfig, limits: Limits | None = None, tell: Callable[[str], None] | None = None, *, taps: bool = False
) -> LLM:
    """The model as the options ask for it, the mode stated before anything starts. Raises every error of ``LLM``.

    ``tell`` is given each line about the start; without it they go to standard error.
    """
    from rich.console import Console

    from tsqp.api.llm import LLM
    from tsqp.cli.pads_bar import pads_bar, pads_lines

    if tell is not None:
        return LLM.of(run, announce=partial(_tell_mode, tell), pads_progress=pads_lines(tell), limits=limits, taps=taps)
    with pads_bar(Console(stderr=True)) as progress:
        return LLM.of(run, announce=_state_mode, pads_progress=progress, limits=limits, taps=taps)


def _lines(plan: Plan) -> Iterator[tuple[str, str]]:
    """The mode, and why the first start is silent for so long."""
    yield from mode_lines(plan)
    compute = plan.run.compute
    if compute.compiled_kernels and keeps_none(compute.kernel_cache):
        yield "no compiled loops are kept yet: this start compiles them, for a minute or more", PLAIN


def _tell_mode(tell: Callable[[str], None], plan: Plan) -> None:
    for line, _ in _lines(plan):
        tell(line)


def _state_mode(plan: Plan) -> None:
    """The mode, on standard error."""
    from rich.console import Console

    console = Console(stderr=True)
    for line, style in _lines(plan):
        console.print(line, style=style, soft_wrap=True, markup=False)
