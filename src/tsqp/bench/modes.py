"""The two modes that a server is measured in, each on a worker of its own."""

from __future__ import annotations

from dataclasses import replace

from tsqp.api.config import RunConfig
from tsqp.bench.opened import in_bfloat16, plain
from tsqp.errors import OptionError

OPEN, MASKED = "open", "masked"  # the modes, and the names of their results


def chosen_modes(only: str | None) -> tuple[str, ...]:
    """Both, or the one asked for. Raises OptionError."""
    if only not in (None, OPEN, MASKED):
        raise OptionError(f"unknown mode '{only}': use {OPEN}, {MASKED}")
    return (OPEN, MASKED) if only is None else (only,)


def in_mode(run: RunConfig, mode: str) -> RunConfig:
    """The same model and threads, as ``in_bfloat16`` has it."""
    bare = plain(run)
    return in_bfloat16(bare if mode == OPEN else replace(bare, protection="masked", guard=run.guard))
