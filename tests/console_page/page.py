"""The page as somebody uses it who has a keyboard and eyes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.commands import LIMIT_S

WATCH = """
window.violations = [];
addEventListener("securitypolicyviolation", (e) => window.violations.push(`${e.violatedDirective} ${e.blockedURI}`));
window.broken = [];
addEventListener("error", (e) => window.broken.push(e.message));
addEventListener("unhandledrejection", (e) => window.broken.push(String(e.reason)));
"""


class Page:
    """The page at ``url``, watched from its first line of script on."""

    def __init__(self, chrome: Chrome, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self.chrome = chrome
        self.url = url
        self._log("performance")  # what came before is not this page's
        self._log("browser")
        self._command("Page.enable")
        watch = self._command("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        self._watch = watch["identifier"]
        self.resize(width, height)
        self._prefers = {"color-scheme": "dark" if dark else "light", "reduced-motion": "no-preference"}
        self._emulate()
        chrome.get(url)

    def close(self) -> None:
        """Leaves the page, and undoes what was set for it."""
        self._command("Page.removeScriptToEvaluateOnNewDocument", identifier=self._watch)
        self._command("Emulation.clearDeviceMetricsOverride")
        self.chrome.get("about:blank")

    def resize(self, width: int, height: int) -> None:
        """The size of the window, also where a window of the desktop would not become so small."""
        self._command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def reduce_motion(self) -> None:
        self._prefers["reduced-motion"] = "reduce"
        self._emulate()

    def _emulate(self) -> None:
        features = [{"name": f"prefers-{name}", "value": value} for name, value in self._prefers.items()]
        self._command("Emulation.setEmulatedMedia", features=features)

    def _command(self, name: str, **parameters: Any) -> dict[str, Any]:
        return self.chrome.execute_cdp_cmd(name, parameters)

    # What somebody does.

    def ask(self, text: str) -> None:
        self.wait_for("Ready", "Failed", "Caught", "Key needed")
        self.field("prompt").send_keys(text, Keys.ENTER)

    def press(self, *keys: str) -> None:
        """Keys for whatever has the focus."""
        self.chrome.switch_to.active_element.send_keys(*keys)

    def click(self, selector: str) -> None:
        self.one(selector).click()

    # What there is to see.

    def one(self, selector: str) -> WebElement:
        return self.chrome.find_element(By.CSS_SELECTOR, selector)

    def field(self, name: str) -> WebElement:
        return self.chrome.find_element(By.ID, name)

    def texts(self, selector: str) -> list[str]:
        """The text of each such element: all of it, with its white space, as the page holds it."""
        script = "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)"
        return self.run(script, selector)

    def text(self, selector: str) -> str:
        (found,) = self.texts(selector)
        return found

    @property
    def answer(self) -> str:
        return self.texts(".answer")[-1]

    @property
    def status(self) -> str:
        return self.text("#status")

    def focused(self) -> str:
        """The id of what has the focus, or its text."""
        return self.run("const one = document.activeElement; return one.id || one.textContent")

    def run(self, script: str, *arguments: Any) -> Any:
        return self.chrome.execute_script(script, *arguments)

    # Readiness.

    def wait(self, ready: Callable[[], object]) -> None:
        WebDriverWait(self.chrome, LIMIT_S, poll_frequency=0.02).until(lambda _: ready())

    def wait_for(self, *states: str) -> None:
        """Until the page says that it is in one of these states."""
        self.wait(lambda: self.status in states)

    def wait_for_end(self) -> None:
        """Until nothing is answered any more."""
        self.wait(lambda: self.one("#send").is_displayed())

    # What the browser says of it.

    def faults(self) -> list[str]:
        """Violations of the policy, scripts that broke, complaints of the browser, requests to another origin."""
        complaints = [
            entry["message"]
            for entry in self._log("browser")
            if "Failed to load resource" not in entry["message"]  # a status that a script of a test asks for
        ]
        ours = urlsplit(self.url).netloc
        elsewhere = [url for url in self.requests() if urlsplit(url).netloc != ours]
        return [*self.run("return [...window.violations, ...window.broken]"), *complaints, *elsewhere]

    def requests(self) -> list[str]:
        """Addresses that the browser asked anything of since the page was opened."""
        messages = [json.loads(entry["message"])["message"] for entry in self._log("performance")]
        sent = (one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent")
        return [url for url in sent if not url.startswith(("data:", "about:", "chrome:"))]

    def _log(self, name: str) -> list[dict[str, Any]]:
        """What has come into one of the browser's logs since it was last read."""
        return self.chrome.get_log(name)  # type: ignore[no-untyped-call]
