"""A real, headless Chromium and its driver, as they are installed: nothing is fetched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

NEEDED = "TSQP_NEED_BROWSER"
MISSING = "no Chromium here: install the packages chromium and chromium-driver"


def paths() -> tuple[str, str]:
    """Browser and driver. Without them a test is skipped, or fails where they must be there."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        if os.environ.get(NEEDED):
            pytest.fail(f"{NEEDED} is set, and there is {MISSING}")
        pytest.skip(MISSING)
    return browser, driver


@contextmanager
def chromium() -> Iterator[Chrome]:
    """A browser with a profile of its own, which keeps a log of its console and of its network."""
    browser, driver = paths()
    options = ChromeOptions()
    options.binary_location = browser
    quiet = ("no-first-run", "disable-background-networking", "disable-component-update", "disable-sync")
    for switch in ("headless=new", "disable-gpu", "disable-dev-shm-usage", "force-device-scale-factor=1", *quiet):
        options.add_argument(f"--{switch}")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium refuses to start otherwise
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # With both paths given, selenium has no reason to look for others; this forbids it.
    os.environ["SE_OFFLINE"] = "true"
    chrome = Chrome(options, Service(driver))
    try:
        yield chrome
    finally:
        chrome.quit()
