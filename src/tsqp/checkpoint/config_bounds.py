"""The bounds of what a configuration may say, for both formats.

A stranger's file may hold any number that can be written. Within these bounds none overflows in what is derived here,
and what is derived is held against them again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from tsqp.config.model import ModelConfig
from tsqp.errors import CorruptCheckpoint

MAX_SIZE = (1 << 31) - 1
MIN_NUMBER, MAX_NUMBER = 1e-30, 1e30  # magnitudes: float32 has them, their inverses, and products with some others


def in_bounds(value: float) -> bool:
    """Whether a number is 0 or of a magnitude that float32 can be computed with."""
    return value == 0 or MIN_NUMBER <= abs(value) <= MAX_NUMBER


def shown(value: object) -> str:
    """What a file says, in one short line."""
    quoted = repr(value)
    return quoted if len(quoted) <= 60 else f"{quoted[:57]}..."


@contextmanager
def refusing_arithmetic(where: str) -> Iterator[None]:
    """What no bound has foreseen: valid numbers that no model can be made from are of a file that is corrupt."""
    try:
        yield
    except ArithmeticError as error:
        raise CorruptCheckpoint(f"{where}: its numbers make no model: {error}") from error


def check_derived(config: ModelConfig, where: str) -> ModelConfig:
    """The same, once the numbers that were made from several are within the bounds. Raises CorruptCheckpoint."""
    if config.max_positions > MAX_SIZE:
        raise CorruptCheckpoint(f"{where}: a context of {shown(config.max_positions)} positions is too long")
    numbers = [
        ("the epsilon of norms", config.rms_norm_eps),
        ("the multiplier of the embedding", config.embedding_multiplier),
        ("the multiplier of logits", config.logits_multiplier),
        ("the scale of scores", config.score_scale or 0.0),
        *(("the attention factor of rope", rope.attention_factor) for rope in (config.rope, *config.other_ropes)),
    ]
    for name, value in numbers:
        if not (math.isfinite(value) and in_bounds(value)):
            raise CorruptCheckpoint(f"{where}: {name} would be {value}")
    return config
