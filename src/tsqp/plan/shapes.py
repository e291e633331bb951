"""The models that a plan knows by a short name, and all others by where they are."""

from __future__ import annotations

from tsqp.checkpoint.synthetic import SHAPES
from tsqp.config.model import ModelConfig
from tsqp.errors import CheckpointNotFound

NAMES = {"1b": "llama-3.2-1b", "8b": "llama-3.1-8b", "70b": "llama-3.1-70b", "405b": "llama-3.1-405b"}


def shape_of(model: str) -> ModelConfig:
    """Of ``70b``, or of a checkpoint, of which only headers are read. Raises CheckpointError, OptionError."""
    name = model.lower().removeprefix("synthetic:")
    name = NAMES.get(name, name)
    if name in SHAPES:
        return SHAPES[name]
    from tsqp.checkpoint import open_checkpoint
    from tsqp.checkpoint.open import locate_here

    try:
        place = locate_here(model)
    except CheckpointNotFound as error:
        raise CheckpointNotFound(f"{error}; or one of the shapes {', '.join(NAMES)}") from None
    return open_checkpoint(place).config
