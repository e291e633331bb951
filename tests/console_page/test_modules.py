"""Modules by themselves, in the browser: what reads the stream, and what makes words of numbers."""

from __future__ import annotations

from typing import Any

import pytest

from tests.console_page.page import Page
from tests.console_page.seen_events import noise

STREAM = (
    'event: state\r\ndata: {"a": 1}\r\n\r\n: a comment\r\n\r\n'
    "data: naïve 😀\r\ndata:second\r\ndata:  third \r\n\r\nid: 1\r\n\r\ndata: cut"
)
EVENTS = [{"name": "state", "data": '{"a": 1}'}, {"name": "", "data": "naïve 😀\nsecond\n third "}]


def of_module(page: Page, module: str, expression: str, *arguments: Any) -> Any:
    script = f"""
        const [...given] = arguments, done = given.pop();
        import("/console/{module}").then(async (m) => done({expression})).catch((error) => done(String(error)));"""
    return page.chrome.execute_async_script(script, *arguments)


@pytest.mark.parametrize("ends", ["\r\n", "\n", "\r"])
def test_events_are_read_wherever_the_network_cuts_them(page: Page, ends: str) -> None:
    read = """await (async () => {
        const bytes = new TextEncoder().encode(given[0]);
        const read = async (cuts) => {
            const pieces = cuts.map((cut, at) => bytes.slice(at ? cuts[at - 1] : 0, cut));
            const body = new ReadableStream({ start(to) { pieces.forEach((one) => to.enqueue(one)); to.close(); } });
            const found = [];
            for await (const event of m.eventsOf(body)) found.push(event);
            return JSON.stringify(found);
        };
        const all = new Set([await read([...bytes.keys(), bytes.length])]);
        for (let cut = 0; cut <= bytes.length; cut++) all.add(await read([cut, bytes.length]));
        return [...all].map((one) => JSON.parse(one));
    })()"""
    assert of_module(page, "events.js", read, STREAM.replace("\r\n", ends)) == [EVENTS]


WORDS = {
    "m.bytes(1023)": "1023 bytes",
    "m.bytes(1024)": "1.00 KiB",
    "m.bytes(1234567)": "1.18 MiB",
    "m.bytes(123456789)": "118 MiB",
    "m.whole(1234567)": "1,234,567",
    "m.percent(0)": "0\u00a0%",
    "m.percent(1 / 3)": "33.3\u00a0%",
    "m.probability(0.4242)": "0.424",
    "m.probability(1)": "1",
    "m.probability(1.234e-9)": "1.23 × 10⁻⁹",
    "m.probability(5e-324)": "4.94 × 10⁻³²⁴",
    "m.probability(0)": "0",
    "m.uniformity(null)": "There are too few numbers for the test.",
    "m.uniformity(0.0004)": "Uniform noise is at least this uneven in up to 1 of 2,500 cases. "
    "Only below 10⁻⁶ would these bytes not be noise.",
    "m.uniformity(1)": "No test finds these bytes more uneven than uniform noise often is. "
    "Only below 10⁻⁶ would these bytes not be noise.",
    "m.uniformity(9e-7)": "Uniform noise is never this uneven. Below 10⁻⁶ these bytes are not noise.",
}


def test_numbers_become_words(page: Page) -> None:
    assert {expression: of_module(page, "words.js", expression) for expression in WORDS} == WORDS


VERDICTS: list[tuple[dict[str, Any], str]] = [
    ({}, "Noise."),
    ({"uniformity_p": 1e-5}, "Noise."),
    ({"uniformity_p": 1e-7}, "Not noise."),
    ({"uniformity_p": None}, "Too little to tell."),
    ({"recovered_fraction": 2 / 7}, "Noise."),  # lucky tokens
    ({"recovered_fraction": 3 / 7}, "Your words."),
    ({"recovered_fraction": 3 / 7, "noise_fraction": 2 / 7}, "Noise."),
    ({"recovered_fraction": 0.05, "user_tokens": 200}, "Noise."),
    ({"recovered_fraction": 0.2, "user_tokens": 200}, "Your words."),
    ({"recovered_fraction": 1.0, "user_tokens": 1}, "Noise."),
    ({"recovered_fraction": 1.0, "user_tokens": 1, "uniformity_p": 0.0}, "Your words."),
    ({"recovered_fraction": 1.0, "user_tokens": 9, "uniformity_p": None}, "Your words."),
    ({"calls": 0}, "Nothing."),
]


def test_the_verdict_is_drawn_from_the_measurements(page: Page) -> None:
    events = [{**noise(1, 1).value, **changes} for changes, _ in VERDICTS]
    titles = of_module(page, "words.js", "given[0].map((one) => m.verdict(one).title)", events)
    assert titles == [title for _, title in VERDICTS]


def test_what_luck_gives_is_not_called_nothing(page: Page) -> None:
    lucky = {**noise(1, 1).value, "recovered_fraction": 1 / 7}
    assert "than luck may give" in of_module(page, "words.js", "m.verdict(given[0]).text", lucky)
