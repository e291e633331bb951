"""From the options of a command to a model that is open, its mode stated first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from tsqp.api.config import RunConfig
from tsqp.api.describe import PLAIN, adapter_lines, mode_lines
from tsqp.api.kernel_cache import keeps_none

if TYPE_CHECKING:
    from rich.console import Console

    from tsqp.api.llm import LLM
    from tsqp.api.plan import Plan
    from tsqp.trusted.engine.limits import Limits


def open_llm(
    run: RunConfig,
    limits: Limits | None = None,
    tell: Callable[[str], None] | None = None,
    *,
    taps: bool = False,
    silent: bool = False,
) -> LLM:
    """The model as the options ask for it, the mode stated before anything starts. Raises every error of ``LLM``.

    ``tell`` is given each line about the start, that pads are made too; without it the mode goes to standard error,
    and what takes long is shown there if that is a terminal, unless ``silent``.
    """
    from rich.console import Console

    from tsqp.api.llm import LLM
    from tsqp.cli.pads_bar import pads_lines, pads_shown
    from tsqp.progress_bar import progress_bar

    if tell is not None:
        llm = LLM.of(run, announce=partial(_tell_mode, tell), pads_progress=pads_lines(tell), limits=limits, taps=taps)
        for line in adapter_lines(llm):
            tell(line)
        return llm
    console = Console(stderr=True)
    with progress_bar(console, silent=silent) as progress:
        llm = LLM.of(
            run,
            announce=partial(_state_mode, console),
            progress=progress,
            pads_progress=pads_shown(progress),
            limits=limits,
            taps=taps,
        )
    for line in adapter_lines(llm):
        console.print(line, style=PLAIN, soft_wrap=True, markup=False)
    return llm


def _lines(plan: Plan) -> Iterator[tuple[str, str]]:
    """The mode, and why the first start is silent for so long."""
    yield from mode_lines(plan)
    compute = plan.run.compute
    if compute.compiled_kernels and keeps_none(compute.kernel_cache):
        yield "no compiled loops are kept yet: this start compiles them, for a minute or more", PLAIN


def _tell_mode(tell: Callable[[str], None], plan: Plan) -> None:
    for line, _ in _lines(plan):
        tell(line)


def _state_mode(console: Console, plan: Plan) -> None:
    """The mode, on standard error."""
    for line, style in _lines(plan):
        console.print(line, style=style, soft_wrap=True, markup=False)
