"""A chat in the browser: what is shown is what the API said, and what is asked is what was typed."""

from __future__ import annotations

import pytest
from selenium.webdriver import Keys

from tests.commands import LIMIT_S
from tests.console_page.fake_server import FakeServer, Gate
from tests.console_page.page import Page
from tests.console_page.seen_events import noise

SEEN = noise(4, 16)
ODD = ["  Two  spaces,\n\n", "a new line,\ttabs, ", "naïve 中文 😀 ", "&amp; <b>no markup</b> ", "**nor** `this`\n "]
INERT = '<img src=x onerror="window.ran=1"><script>window.ran=1</script><svg onload="window.ran=1">'


def test_the_text_shown_is_the_texts_of_the_api(page: Page, server: FakeServer) -> None:
    server.script = [*ODD, SEEN]
    page.ask("hello")
    page.wait(lambda: page.texts(".numbers"))
    assert page.answer == "".join(ODD)
    assert page.run("return getComputedStyle(document.querySelector('.answer')).whiteSpace").startswith("pre-wrap")


def test_pieces_are_shown_as_they_come(page: Page, server: FakeServer) -> None:
    gate = Gate()
    server.script = ["first", gate, " second", SEEN]
    page.ask("hello")
    page.wait(lambda: page.answer == "first")
    assert page.status == "Answering"
    gate.open()
    page.wait_for("Ready")
    assert page.answer == "first second"


def test_a_script_in_question_answer_or_recovered_text_is_text(page: Page, server: FakeServer) -> None:
    server.about = {**server.about, "model": INERT}
    server.script = [INERT, noise(4, 16, recovered_text=INERT, picture_of=INERT)]
    page.chrome.refresh()
    page.ask(INERT)
    page.wait(lambda: page.texts(".recovered"))
    assert page.answer == page.text(".question") == page.text(".recovered") == page.text("#model") == INERT
    assert page.run("return document.querySelectorAll('img, #log script, [onload], [onerror]').length") == 0
    assert page.run("return window.ran") is None


def test_an_answer_is_stopped(page: Page, server: FakeServer) -> None:
    server.script = ["a beginning", Gate(), " and an end", SEEN]
    page.ask("hello")
    page.wait(lambda: page.answer == "a beginning")
    page.press(Keys.ESCAPE)
    page.wait_for("Ready")
    assert server.left.wait(LIMIT_S)
    assert page.answer == "a beginning"
    assert "Stopped." in page.text(".note")
    assert "You stopped this answer" in page.text("#seen-body")
    assert page.focused() == "prompt"


def test_an_answer_ends_when_the_page_is_left(page: Page, server: FakeServer) -> None:
    server.script = ["a beginning", Gate()]
    for _ in range(2):  # a browser seldom keeps the first page that is left
        server.left.clear()
        page.ask("hello")
        page.wait(lambda: page.answer == "a beginning")
        page.chrome.get("about:blank")
        assert server.left.wait(LIMIT_S)
        page.chrome.get(page.url)


def test_what_was_stopped_is_part_of_the_conversation_and_what_gave_nothing_is_not(
    page: Page, server: FakeServer
) -> None:
    server.script = [Gate()]
    page.ask("nothing comes")
    page.wait_for("Answering")
    page.wait(lambda: server.asked)
    page.click("#stop")
    server.script = ["half", Gate()]
    page.ask("half comes")
    page.wait(lambda: page.answer == "half")
    page.click("#stop")
    server.script = ["whole", SEEN]
    page.ask("all comes")
    page.wait(lambda: page.texts(".numbers"))
    assert server.asked[-1]["messages"] == [
        {"role": "user", "content": "half comes"},
        {"role": "assistant", "content": "half"},
        {"role": "user", "content": "all comes"},
    ]


def test_parameters_are_sent_as_typed_and_left_to_the_server_otherwise(page: Page, server: FakeServer) -> None:
    server.script = ["yes", SEEN]
    page.ask("plain")
    page.wait(lambda: page.texts(".numbers"))
    assert server.asked[-1] == {
        "model": "smollm2-135m-instruct",
        "messages": [{"role": "user", "content": "plain"}],
        "max_tokens": 200,
        "stream": True,
        "n": 1,
    }
    page.click("#options summary")
    for name, value in (("temperature", "0.5"), ("seed", "7"), ("system", "Be short.")):
        page.field(name).send_keys(value)
    page.field("max-tokens").clear()
    page.click("#reset")
    page.ask("with all")
    page.wait(lambda: len(server.asked) == 2)
    page.wait_for("Ready")
    assert {name: server.asked[-1].get(name) for name in ("temperature", "seed", "max_tokens", "messages")} == {
        "temperature": 0.5,
        "seed": 7,
        "max_tokens": None,
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "with all"}],
    }


@pytest.mark.parametrize("name", ["prompt", "system", "key-input"])
def test_what_is_typed_is_not_for_the_browsers_own_services(page: Page, name: str) -> None:
    """A spelling checker may send it to somebody who makes browsers. So may a translator, with the answers."""
    assert page.field(name).get_attribute("spellcheck") == "false"
    assert page.run("return document.documentElement.translate") is False


@pytest.mark.parametrize("temperature", ["0.75", "1.333"])
def test_a_temperature_may_be_any_number(page: Page, server: FakeServer, temperature: str) -> None:
    server.script = ["yes", SEEN]
    page.click("#options summary")
    page.field("temperature").send_keys(temperature)
    page.ask("hello")
    page.wait(lambda: page.texts(".numbers"))
    assert server.asked[-1]["temperature"] == float(temperature)


def test_a_parameter_that_cannot_be_is_not_sent(page: Page, server: FakeServer) -> None:
    page.click("#options summary")
    page.field("temperature").send_keys("3")
    page.click("#options summary")
    page.ask("hello")
    page.wait(lambda: page.focused() == "temperature")
    assert page.field("temperature").is_displayed()
    assert (server.asked, page.field("prompt").get_attribute("value")) == ([], "hello")


def test_the_keyboard_is_enough(page: Page, server: FakeServer) -> None:
    server.script = ["yes", SEEN]
    page.wait_for("Ready")
    assert page.focused() == "prompt"
    page.press("one", Keys.SHIFT, Keys.ENTER, Keys.NULL, "two", Keys.ENTER)
    page.wait(lambda: page.texts(".numbers"))
    assert page.text(".question") == "one\ntwo"
    assert page.focused() == "prompt"
    page.press(Keys.SHIFT, Keys.TAB, Keys.NULL)
    assert page.focused() == "What the worker saw"
    page.press(Keys.ENTER)
    assert page.focused() == "seen"
    page.press(Keys.TAB)
    assert page.run("return document.activeElement.className") == "text recovered"


def test_enter_that_ends_a_composition_sends_nothing(page: Page, server: FakeServer) -> None:
    page.wait_for("Ready")
    page.field("prompt").send_keys("にほん")
    page.run(
        "arguments[0].dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))",
        page.field("prompt"),
    )
    assert (server.asked, page.texts(".question")) == ([], [])


def test_escape_that_ends_a_composition_stops_nothing(page: Page, server: FakeServer) -> None:
    gate = Gate()
    server.script = ["a beginning", gate, " and an end", SEEN]
    page.ask("hello")
    page.wait(lambda: page.answer == "a beginning")
    page.run(
        "arguments[0].dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', isComposing: true, bubbles: true}))",
        page.field("prompt"),
    )
    gate.open()
    page.wait(lambda: page.texts(".numbers"))
    assert page.answer == "a beginning and an end"


def test_the_panel_is_of_the_answer_that_was_stopped_and_of_no_earlier_one(page: Page, server: FakeServer) -> None:
    server.script = ["first", SEEN]
    page.ask("one")
    page.wait(lambda: page.texts(".numbers"))
    server.script = ["second", Gate()]
    page.ask("two")
    page.wait(lambda: page.answer == "second")
    page.click(".look")
    assert page.text("#seen-body .about") == "one"
    page.press(Keys.ESCAPE)
    page.wait_for("Ready")
    assert "You stopped this answer" in page.text("#seen-body")
    assert page.one(".look").get_attribute("aria-pressed") == "false"


def test_a_new_chat_forgets_the_old_one(page: Page, server: FakeServer) -> None:
    server.script = ["yes", SEEN]
    page.ask("first")
    page.wait(lambda: page.texts(".numbers"))
    page.click("#reset")
    assert (page.texts(".turn"), page.texts(".numbers")) == ([], [])
    assert page.one("#welcome").is_displayed()
    page.ask("second")
    page.wait(lambda: page.texts(".numbers"))
    assert server.asked[-1]["messages"] == [{"role": "user", "content": "second"}]


def test_an_example_is_put_into_the_field(page: Page, server: FakeServer) -> None:
    page.wait_for("Ready")
    page.click("#examples button")
    assert page.field("prompt").get_attribute("value") == "What is the capital of France?"
    assert (page.focused(), server.asked) == ("prompt", [])
