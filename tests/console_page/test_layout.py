"""Every state on a narrow screen and a wide one, in the light and in the dark, for eyes, keys and screen readers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from selenium.webdriver import Chrome, Keys

from tests.console_page.fake_server import Failure, FakeServer, Gate, Named
from tests.console_page.page import Page
from tests.console_page.seen_events import activations, noise

NARROW = (360, 740)
LONG = "Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogogoch" * 3


@pytest.fixture(params=["light", "dark"])
def narrow(request: pytest.FixtureRequest, chrome: Chrome, server: FakeServer) -> Iterator[Page]:
    page = Page(chrome, server.url, width=NARROW[0], height=NARROW[1], dark=request.param == "dark")
    yield page
    page.close()


def overflow(page: Page) -> list[str]:
    """What is wider than the window, and is not cut or scrolled by its own box."""
    script = """
        const width = document.documentElement.clientWidth;
        if (document.documentElement.scrollWidth <= width) return [];
        return [...document.querySelectorAll("body *")]
            .filter((one) => one.getBoundingClientRect().right > width + 0.5)
            .map((one) => `${one.tagName}.${one.className} ${one.getBoundingClientRect().right}`);"""
    return page.run(script)


def test_nothing_is_wider_than_a_narrow_screen(narrow: Page, server: FakeServer) -> None:
    server.about = {**server.about, "model": "an-organisation/" + LONG}
    narrow.chrome.refresh()
    narrow.wait_for("Ready")
    assert overflow(narrow) == []
    narrow.click("#options summary")
    assert overflow(narrow) == []
    narrow.click("#options summary")
    gate = Gate()
    server.script = [LONG, gate, activations(recovered_text=LONG)]
    narrow.ask(LONG)
    narrow.wait(lambda: narrow.answer == LONG)
    assert overflow(narrow) == []
    gate.open()
    narrow.wait(lambda: narrow.texts(".numbers"))
    assert overflow(narrow) == []
    server.script = [Failure(503, "unavailable", LONG)]
    narrow.ask("once more")
    narrow.wait_for("Failed")
    assert overflow(narrow) == []


def test_on_a_narrow_screen_the_panel_is_below_and_a_button_leads_there(narrow: Page, server: FakeServer) -> None:
    server.script = ["yes", noise()]
    narrow.ask("hello")
    narrow.wait(lambda: narrow.texts(".numbers"))
    chat, seen = (narrow.one(selector).rect for selector in (".chat", ".seen"))
    assert seen["y"] >= chat["y"] + chat["height"] - 1
    narrow.click(".look")
    top = "return document.getElementById('seen').getBoundingClientRect().top"
    narrow.wait(lambda: narrow.run(top) < NARROW[1] / 2)
    assert narrow.focused() == "seen"


def test_the_field_stays_in_sight_while_a_long_answer_comes(narrow: Page, server: FakeServer) -> None:
    gate = Gate()
    server.script = [*["a line of the answer\n"] * 80, gate, noise(4, 16)]
    narrow.ask("hello")
    narrow.wait(lambda: narrow.answer.count("\n") == 80)
    inside = """
        const [end, box] = ["#end", ".composer"].map((one) => document.querySelector(one).getBoundingClientRect());
        return box.bottom <= innerHeight + 1 && end.bottom <= box.top + 1 && end.top > 0;"""
    narrow.wait(lambda: narrow.run(inside))
    gate.open()
    narrow.wait_for("Ready")


def test_on_a_wide_screen_they_are_side_by_side_and_fill_the_window(page: Page, server: FakeServer) -> None:
    server.script = [*["a line of the answer\n"] * 80, noise()]
    page.ask("hello")
    page.wait(lambda: page.texts(".numbers"))
    chat, seen = (page.one(selector).rect for selector in (".chat", ".seen"))
    assert chat["x"] + chat["width"] <= seen["x"] + 1
    assert page.run("return document.documentElement.scrollHeight <= innerHeight")
    assert page.run("return document.querySelector('.composer').getBoundingClientRect().bottom") <= 900.5


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_from_its_ground(chrome: Chrome, server: FakeServer, dark: bool) -> None:
    """WCAG 2: a contrast of 4.5 for text, in each of the states that have a colour of their own."""
    page = Page(chrome, server.url, dark=dark)
    page.wait_for("Ready")
    server.script = ["a", Named("state", {"state": "ready", "since_s": 0, "expelled": ["b"]}), activations()]
    page.ask("hello")
    page.wait(lambda: page.texts(".numbers"))
    server.script = [Failure(429, "queue_full", "busy")]
    page.ask("hello")
    page.wait(lambda: len(page.texts(".note")) == 2)
    assert page.run(CONTRAST) == []
    page.close()


CONTRAST = """
const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map((one) => one / 255)
    .map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4))
    .reduce((sum, one, at) => sum + one * [0.2126, 0.7152, 0.0722][at], 0);
const ground = (one) => {
    for (; one; one = one.parentElement) {
        const colour = channels(getComputedStyle(one).backgroundColor);
        if (colour.length === 3 || colour[3] === 1) return colour;
    }
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const poor = [];
for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const one = text.parentElement;
    if (!text.data.trim() || !one.checkVisibility() || one.closest("noscript, .unseen")) continue;
    const [a, b] = [light(channels(getComputedStyle(one).color)), light(ground(one))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < 4.5) poor.push(`${text.data.trim().slice(0, 40)}: ${contrast.toFixed(2)}`);
}
return poor;
"""


def test_focus_is_seen_wherever_it_goes(page: Page, server: FakeServer) -> None:
    server.script = ["yes", noise(4, 16)]
    page.ask("hello")
    page.wait(lambda: page.texts(".numbers"))
    page.click("#options summary")
    visited: set[str] = set()
    for _ in range(14):
        page.press(Keys.TAB)
        visited.add(page.focused())
        shown = """
            const one = document.activeElement;
            const styles = [one, one.closest(".box") ?? one].map((each) => getComputedStyle(each));
            return one === document.body || styles.some((style) => parseFloat(style.outlineWidth) > 0);"""
        assert page.run(shown), page.focused()
    assert {"temperature", "max-tokens", "seed", "system", "reset", "prompt", "send"} <= visited


def test_nothing_moves_for_who_wants_no_motion(page: Page, server: FakeServer) -> None:
    gate = Gate()
    server.script = ["a", gate, noise(4, 16)]
    page.ask("hello")
    page.wait(lambda: page.answer == "a")
    moving = "return document.getAnimations().length"
    page.wait(lambda: page.run(moving) > 0)
    page.reduce_motion()
    page.wait(lambda: page.run(moving) == 0)
    gate.open()
    page.wait_for("Ready")


def test_a_screen_reader_is_told(page: Page, server: FakeServer) -> None:
    gate = Gate()
    server.script = ["a", gate, noise(4, 16)]
    page.ask("hello")
    page.wait(lambda: page.answer == "a")
    assert page.one("#log").get_attribute("aria-busy") == "true"
    gate.open()
    page.wait_for("Ready")
    page.wait(lambda: page.one("#log").get_attribute("aria-busy") is None)
    assert (page.one("#status").aria_role, page.one("#log").aria_role) == ("status", "log")
    landmarks = [page.one(one).aria_role for one in ("header", "main", "aside")]
    assert landmarks == ["banner", "main", "complementary"]
    nameless = """
        const nameless = (one) => !one.labels?.length && !one.textContent.trim() && !one.ariaLabel;
        return [...document.querySelectorAll("button, input, textarea, summary, svg, canvas")].filter(nameless)
            .map((one) => one.outerHTML)"""
    assert page.run(nameless) == []
