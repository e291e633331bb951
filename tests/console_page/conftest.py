"""One browser for all tests; for each a server that plays its script, and the page at that server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from selenium.webdriver import Chrome

from tests.console_page.browser import chromium
from tests.console_page.fake_server import FakeServer, fake_server
from tests.console_page.page import Page


@pytest.fixture(scope="session")
def chrome() -> Iterator[Chrome]:
    with chromium() as chrome:
        yield chrome


@pytest.fixture(scope="session")
def running() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


@pytest.fixture
def server(running: FakeServer) -> FakeServer:
    """Without a script, and as if nobody had asked before."""
    running.reset()
    return running


@pytest.fixture
def page(chrome: Chrome, server: FakeServer) -> Iterator[Page]:
    """The page, without a fault at the end of the test."""
    page = Page(chrome, server.url)
    yield page
    faults = page.faults()
    page.close()
    assert faults == []
