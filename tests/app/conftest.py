"""A home for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.app.commands import Home


@pytest.fixture
def home() -> Iterator[Home]:
    home = Home()
    yield home
    home.remove()
