"""Nothing of another origin, nothing that the policy refuses, and a policy that would refuse it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.commands import LIMIT_S
from tests.console_page.fake_server import STATIC, FakeServer, Named
from tests.console_page.page import Page
from tests.console_page.seen_events import noise

MODULES = sorted(STATIC.glob("*.js"))
FILES = sorted(path for path in STATIC.iterdir() if path.is_file())
# What would make markup of text, keep it, or need the policy to be looser.
REFUSED = (
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|srcdoc|createContextualFragment|\beval\b|"
    r"new Function|Storage|document\.cookie|indexedDB|setAttribute\(\"style\"|https?://(?!www\.w3\.org/2000/svg)"
)


def test_a_whole_chat_asks_one_origin_alone_and_breaks_no_rule(page: Page, server: FakeServer) -> None:
    paused = Named("state", {"state": "reconnecting", "since_s": 0.0, "expelled": []})
    server.script = ["one ", paused, Named("state", {**paused.value, "state": "ready"}), "two", noise(4, 16)]
    page.ask("hello")
    page.wait(lambda: page.texts(".numbers"))
    # What the browser itself says that it has loaded; the log of its network is looked at after every test.
    names = page.run("return performance.getEntries().map((one) => one.name).filter((name) => name.includes('://'))")
    assert {urlsplit(name).netloc for name in names} == {urlsplit(server.url).netloc}
    loaded = {urlsplit(name).path for name in names}
    assert {f"/console/{path.name}" for path in MODULES} <= loaded


@pytest.mark.parametrize(
    ("attempt", "directive"),
    [
        (
            "const s = document.createElement('script'); s.text = 'window.ran = 1'; document.head.append(s)",
            "require-trusted-types-for",
        ),
        ("document.body.innerHTML = '<b>markup</b>'", "require-trusted-types-for"),
        ("document.body.setAttribute('style', 'color: red')", "style-src"),
        ("fetch('http://127.0.0.1:9/').catch(() => {})", "connect-src"),
        ("const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'", "img-src"),
    ],
)
def test_the_policy_is_in_force_and_the_watch_sees_it(page: Page, attempt: str, directive: str) -> None:
    page.wait_for("Ready")
    # As a script of the page would: what a driver runs may do more than the page.
    page.run("try { " + attempt + " } catch (error) { window.refused = String(error) }")
    page.wait(lambda: page.run("return window.violations.length > 0 || window.refused"))
    assert page.run("return window.ran") is None
    told = page.run("return [...window.violations, window.refused]")
    assert any(directive in (one or "") or "TrustedHTML" in (one or "") for one in told), told
    assert page.faults() != []
    page.run("window.violations.length = 0")


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_a_module_is_small_and_makes_no_markup(module: Path) -> None:
    source = module.read_text(encoding="utf-8")
    assert re.findall(REFUSED, source) == []
    assert source.startswith("// ")
    assert len(source.splitlines()) <= 250


@pytest.mark.skipif(shutil.which("node") is None, reason="no node here")
def test_each_module_is_read_by_node_too() -> None:
    read = """
        const vm = require("vm"), fs = require("fs");
        for (const name of process.argv.slice(1)) new vm.SourceTextModule(fs.readFileSync(name, "utf8"));"""
    command = ("node", "--no-warnings", "--experimental-vm-modules", "--eval", read, *map(str, MODULES))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr


def test_page_and_style_name_nothing_elsewhere() -> None:
    for path in FILES:
        if path.suffix in (".html", ".css", ".svg"):
            text = path.read_text(encoding="utf-8")
            assert re.findall(REFUSED, text) == [], path.name
            assert re.findall(r"url\(|@import|\sstyle=|\son\w+=|<script>", text) == [], path.name
