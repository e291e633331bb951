"""From the options of a command to a model that is open, its mode stated first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tsqp.api.config import RunConfig
from tsqp.api.describe import mode_lines

if TYPE_CHECKING:
    from tsqp.api.llm import LLM
    from tsqp.api.plan import Plan
    from tsqp.trusted.engine.limits import Limits


def open_llm(run: RunConfig, limits: Limits | None = None, *, taps: bool = False) -> LLM:
    """The model as the options ask for it, the mode stated before anything starts. Raises every error of ``LLM``."""
    from rich.console import Console

    from tsqp.api.llm import LLM
    from tsqp.cli.pads_bar import pads_bar

    with pads_bar(Console(stderr=True)) as progress:
        return LLM.of(run, announce=_state_mode, pads_progress=progress, limits=limits, taps=taps)


def _state_mode(plan: Plan) -> None:
    """The mode, on standard error."""
    from rich.console import Console

    console = Console(stderr=True)
    for line, style in mode_lines(plan):
        console.print(line, style=style, soft_wrap=True, markup=False)
