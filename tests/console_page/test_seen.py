"""The panel: the picture, the histogram, and the sentences are those of the event."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from tests.console_page.fake_server import FakeServer, Named
from tests.console_page.page import Page
from tests.console_page.seen_events import GIBBERISH, WORDS, activations, noise, seen


def shown(page: Page, server: FakeServer, event: Named) -> None:
    server.script = ["yes", event]
    page.ask(WORDS)
    page.wait(lambda: page.texts(".numbers"))


def numbers(page: Page) -> dict[str, str]:
    return dict(zip(page.texts(".numbers dt"), page.texts(".numbers .value"), strict=True))


def test_masked_is_said_to_be_noise(page: Page, server: FakeServer) -> None:
    shown(page, server, noise())
    assert page.text(".headline") == "Noise."
    assert page.text(".attack h3") == "An attacker makes this of it:"
    assert page.text(".recovered") == GIBBERISH
    assert "0 of 7 tokens" in page.text(".attack .small")
    assert page.text(".p").startswith("p = 0.42. Uniform noise is at least this uneven in up to 42 of 100 cases.")
    assert numbers(page) == {
        "Sent to the worker": "1.18 MiB",
        "Speed": "16.8 tokens/s",
        "Products checked": "121",
        "Pads left": "4,096",
    }


def test_open_is_said_to_be_the_users_words(page: Page, server: FakeServer) -> None:
    shown(page, server, activations())
    assert page.text(".headline") == "Your words."
    assert page.text(".attack h3") == "An attacker reads:"
    assert page.text(".recovered") == WORDS
    assert "7 of 7 tokens" in page.text(".attack .small")
    assert "Uniform noise is never this uneven." in page.text(".p")
    assert (numbers(page)["Products checked"], numbers(page)["Pads left"]) == ("none", "none")


def test_a_mode_that_breaks_its_promise_is_not_called_noise(page: Page, server: FakeServer) -> None:
    shown(page, server, activations(protection="masked"))
    assert page.text(".headline") == "Your words."


def test_the_picture_has_a_dot_for_each_byte(page: Page, server: FakeServer) -> None:
    values = np.arange(3 * 8, dtype=np.uint8).reshape(3, 8) + 100
    values[2] = 255  # eight of the 24 are the same
    shown(page, server, seen(values, np.full(256, 1 / 256)))
    script = """
        const canvas = document.querySelector("canvas");
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return [canvas.width, canvas.height, [...data].filter((_, at) => at % 4 === 0)];"""
    width, height, red = page.run(script)
    thick = height // 3
    assert (width, height) == (8, 150)
    lines = np.array(red).reshape(3, thick, 8)
    assert (lines == lines[:, :1]).all()  # a row of numbers is a line of one colour a number
    ranks = np.concatenate([np.arange(16) + 0.5, np.full(8, 20)]).reshape(3, 8)
    assert (lines[:, 0] == np.rint(20 + (244 - 20) * ranks / 24)).all()
    assert page.run("return getComputedStyle(document.querySelector('canvas')).imageRendering") == "pixelated"


def test_the_histogram_has_a_bar_for_each_byte_beside_what_noise_would_have(page: Page, server: FakeServer) -> None:
    values = np.repeat(np.arange(256, dtype=np.uint8), 4)
    values[:4] = 255  # 0 does not come, and 255 twice as often as the others
    shown(page, server, seen(values.reshape(4, 256), np.full(256, 1 / 256)))
    heights = np.array(
        page.run("return [...document.querySelectorAll('rect.bar')].map((one) => one.height.baseVal.value)")
    )
    assert (heights[0], len(heights)) == (0, 256)
    assert heights[1:255] == pytest.approx(heights[1], abs=0.02)
    assert heights[255] == pytest.approx(2 * heights[1], abs=0.02)
    (line,) = page.run("return [document.querySelector('polyline').getAttribute('points')]")
    expected = np.array(line.split(), dtype=float).reshape(-1, 2)[:, 1]
    assert 96 - expected == pytest.approx(heights[1], abs=0.02)
    assert "The rarest byte comes 0.00× as often as in uniform noise, the most frequent 2.00×." in page.text(
        "figcaption:has(.legend)"
    )


def test_without_a_worker_there_is_nothing_to_see(page: Page, server: FakeServer) -> None:
    nothing = noise(0, 16, protection="local", calls=0, bytes_seen=0, kept_bytes=0, pads_left=None, checks=0)
    shown(page, server, nothing)
    assert page.text(".headline") == "Nothing."
    assert page.texts("canvas, svg") == []


def test_what_was_not_kept_is_said(page: Page, server: FakeServer) -> None:
    shown(page, server, noise(4, 16, bytes_seen=50 << 20, kept_bytes=16 << 20))
    assert "Counted in the first 16.0 MiB." in page.text("figcaption:has(.legend)")


def test_each_answer_keeps_what_was_seen_of_it(page: Page, server: FakeServer) -> None:
    shown(page, server, activations())
    server.script = ["no", noise()]
    page.ask("And of Spain?")
    page.wait(lambda: page.text(".headline") == "Noise.")
    assert page.run("return [...document.querySelectorAll('.look')].map((one) => one.ariaPressed)") == ["false", "true"]
    page.click(".turn:first-child .look")
    assert (page.text(".headline"), page.text(".about")) == ("Your words.", WORDS)
    assert page.run("return [...document.querySelectorAll('.look')].map((one) => one.ariaPressed)") == ["true", "false"]


def test_the_picture_is_the_bytes_of_the_event() -> None:
    event = noise(2, 8)
    assert len(base64.b64decode(event.value["picture"])) == 16
    assert sum(event.value["histogram"]) == 16
