"""What goes wrong is said plainly, in words, and the page goes on."""

from __future__ import annotations

import pytest
from selenium.webdriver import Keys

from tests.console_page.fake_server import Broken, Cut, Failure, FakeServer, Gate, Named, Step
from tests.console_page.page import Page
from tests.console_page.seen_events import noise

SEEN = noise(4, 16)
LOST = Named("state", {"state": "reconnecting", "since_s": 0.0, "expelled": []})
BACK = Named("state", {"state": "ready", "since_s": 0.0, "expelled": []})
CAUGHT_ONE = Named("state", {"state": "ready", "since_s": 0.0, "expelled": ["b"]})
CHEATED = Failure(503, "worker_cheated", "the worker failed a check: nothing was made of its answer")


def test_a_lost_worker_is_a_pause_and_the_answer_goes_on(page: Page, server: FakeServer) -> None:
    lost, back = Gate(), Gate()
    server.script = ["before", LOST, lost, BACK, back, " after", SEEN]
    page.ask("hello")
    page.wait_for("Paused")
    assert "Paused." in page.text(".note")
    assert page.answer == "before"
    lost.open()
    page.wait_for("Answering")
    assert "Went on." in page.text(".note")
    back.open()
    page.wait_for("Ready")
    assert page.answer == "before after"
    assert "Paused." not in page.text(".notes")
    assert page.texts(".numbers")


def test_a_caught_worker_is_said_plainly(page: Page, server: FakeServer) -> None:
    server.script = ["before", CHEATED]
    page.ask("hello")
    page.wait_for("Caught")
    assert "A worker or dealer was caught." in page.text('.note[role="alert"]')
    assert page.answer == "before"
    assert page.texts(".numbers") == []


def test_a_caught_worker_beside_others_does_not_end_the_answer(page: Page, server: FakeServer) -> None:
    server.script = ["before", CAUGHT_ONE, " after", SEEN]
    page.ask("hello")
    page.wait(lambda: page.texts(".numbers"))
    assert page.answer == "before after"
    assert "A worker or dealer was caught." in page.text(".note")
    assert "sent away: b." in page.text(".note")


def test_who_was_caught_is_said_once(page: Page, server: FakeServer) -> None:
    first, second = Gate(), Gate()
    both = Named("state", {"state": "ready", "since_s": 0.0, "expelled": ["b", "c"]})
    server.script = [CAUGHT_ONE, "one", first, CAUGHT_ONE, " still", second, both, " two", SEEN]
    page.ask("hello")
    page.wait(lambda: page.answer == "one")
    page.run("document.querySelector('.note').dataset.seen = 1")
    first.open()
    page.wait(lambda: page.answer == "one still")
    assert page.one(".note").get_attribute("data-seen") == "1"  # a new one would be read out again
    second.open()
    page.wait_for("Ready")
    assert "sent away: b, c." in page.text(".note")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ([Failure(503, "worker_lost", "the worker cannot be reached")], "The worker cannot be reached."),
        (["a", LOST, Failure(503, "worker_lost", "the worker cannot be reached")], "The worker cannot be reached"),
        (["a", Cut()], "The connection ended before the answer did."),
        (["a", Broken()], "The connection ended before the answer did."),
        ([Failure(400, "context_length_exceeded", "the prompt is too long")], "The prompt is too long."),
    ],
)
def test_an_answer_that_fails_says_why_and_can_be_asked_again(
    page: Page, server: FakeServer, script: list[Step], said: str
) -> None:
    server.script = script
    page.ask("hello")
    page.wait_for("Failed")
    assert said in page.text('.note[role="alert"]')
    assert page.texts(".numbers") == []
    assert ("not begun" if said == "The prompt is too long." else "thrown away") in page.text("#seen-body")
    page.click(".note button")
    assert page.field("prompt").get_attribute("value") == "hello"
    server.script = ["fine", SEEN]
    page.press(Keys.ENTER)
    page.wait_for("Ready")
    assert page.answer == "fine"
    assert server.asked[-1]["messages"] == [{"role": "user", "content": "hello"}]


def test_a_busy_server_is_no_failure(page: Page, server: FakeServer) -> None:
    server.script = [Failure(429, "queue_full", "too many requests wait already", retry_after_s=3)]
    page.ask("hello")
    page.wait(lambda: page.texts(".note"))
    assert page.text(".note p") == "Busy. Too many requests wait already. Ask again in 3 s."
    assert page.status == "Ready"
    assert "not begun" in page.text("#seen-body")
    assert len(server.asked) == 1


def test_the_page_waits_while_the_server_looks_at_another_answer(page: Page, server: FakeServer) -> None:
    busy = Failure(429, "console_busy", "one answer at a time is looked at", retry_after_s=0)
    server.refusals = [busy, busy]
    server.script = ["at last", SEEN]
    page.ask("hello")
    page.wait(lambda: page.texts(".numbers"))
    assert (page.answer, page.texts(".note"), len(server.asked)) == ("at last", [], 3)
    server.refusals = [busy] * 9
    page.ask("hello")
    page.wait(lambda: page.texts(".note button"))
    assert "Busy." in page.text(".note")
    assert len(server.asked) == 8
    server.refusals = [Failure(429, "console_busy", "one answer at a time is looked at", retry_after_s=1000)]
    page.ask("hello")
    page.wait(lambda: "Waiting." in page.texts(".turn:last-child .notes")[0])
    page.press(Keys.ESCAPE)
    page.wait_for("Ready")
    assert page.text(".turn:last-child .note strong") == "Stopped."


def test_a_key_is_asked_for_kept_nowhere_and_sent(page: Page, server: FakeServer) -> None:
    server.key = "s3cret"
    server.script = ["let in", SEEN]
    page.chrome.refresh()
    page.wait(lambda: page.focused() == "key-input")
    assert page.status == "Key needed"
    page.press("wrong", Keys.ENTER)
    page.wait(lambda: "does not take" in page.text("#key-problem"))
    page.press("s3cret", Keys.ENTER)
    page.wait_for("Ready")
    assert not page.one("#key").is_displayed()
    page.ask("hello")
    page.wait(lambda: page.texts(".numbers"))
    assert page.answer == "let in"
    kept = "return [document.documentElement.outerHTML, location.href, document.cookie, ...Object.values(localStorage),"
    fields = " ...Object.values(sessionStorage), ...[...document.querySelectorAll('input')].map((one) => one.value)]"
    assert "s3cret" not in "".join(page.run(kept + fields))
    assert page.run("return document.forms.length") == 0


@pytest.mark.parametrize("key", ["schlüssel", "s3\u200bcret", "s3 cret", "ключ"])
def test_a_key_that_no_server_can_have_given_is_not_tried(page: Page, server: FakeServer, key: str) -> None:
    """A header cannot carry it: the browser itself would refuse."""
    server.key = "s3cret"
    page.chrome.refresh()
    page.wait(lambda: page.focused() == "key-input")
    page.press(key, Keys.ENTER)
    page.wait(lambda: "letters, digits and signs" in page.text("#key-problem"))
    page.press(Keys.CONTROL, "a", Keys.NULL, "s3cret", Keys.ENTER)
    page.wait_for("Ready")


def test_a_key_dialog_can_be_left_and_comes_back(page: Page, server: FakeServer) -> None:
    server.key = "s3cret"
    server.script = ["let in", SEEN]
    page.chrome.refresh()
    page.wait(lambda: page.focused() == "key-input")
    page.press(Keys.ESCAPE)
    page.wait(lambda: not page.one("#key").is_displayed())
    assert page.status == "Key needed"
    page.ask("hello")
    page.wait(lambda: page.focused() == "key-input")
    page.press("s3cret", Keys.ENTER)
    page.wait(lambda: page.texts(".numbers"))
    assert page.answer == "let in"


def test_a_key_that_has_ended_is_asked_for_again_before_the_message_leaves(page: Page, server: FakeServer) -> None:
    page.wait_for("Ready")
    server.key = "new"
    page.ask("hello")
    page.wait(lambda: page.focused() == "key-input")
    page.press(Keys.ESCAPE)
    page.wait(lambda: page.texts(".note"))
    assert (page.status, page.text(".note strong"), server.asked) == ("Key needed", "Key needed.", [])
    server.script = ["let in", SEEN]
    page.click(".note button")
    page.press(Keys.ENTER)
    page.wait(lambda: page.focused() == "key-input")
    page.press("new", Keys.ENTER)
    page.wait(lambda: page.texts(".numbers"))
    assert page.answer == "let in"


def test_a_message_that_is_sent_while_the_page_connects_waits_for_the_key(page: Page, server: FakeServer) -> None:
    server.key = "s3cret"
    server.script = ["let in", SEEN]
    server.about_gate = Gate()
    page.chrome.refresh()
    page.wait(lambda: server.about_gate and server.about_gate.reached)
    page.field("prompt").send_keys("hello", Keys.ENTER)
    server.about_gate.open()
    page.wait(lambda: page.focused() == "key-input")
    page.press("s3cret", Keys.ENTER)
    page.wait(lambda: page.texts(".numbers"))
    assert page.answer == "let in"


def test_a_message_is_not_sent_while_the_server_does_not_say_who_it_is(page: Page, server: FakeServer) -> None:
    page.wait_for("Ready")
    server.about_gate = Gate()
    page.ask("hello")
    page.wait(lambda: server.about_gate and server.about_gate.reached)
    assert page.status == "Answering"
    page.press(Keys.ESCAPE)
    page.wait_for("Ready")
    assert (page.text(".note"), server.asked) == ("Stopped. Your message was not sent.Ask again", [])
    assert "This answer was not begun." in page.text("#seen-body")
    server.about_gate.open()


SOON = "const real = AbortSignal.timeout.bind(AbortSignal); AbortSignal.timeout = (ms) => real(ms / 100)"


def test_a_server_that_does_not_say_who_it_is_is_given_up_and_asked_again(page: Page, server: FakeServer) -> None:
    page.wait_for("Ready")
    page.run(SOON)
    server.about_gate = gate = Gate()
    page.ask("hello")
    page.wait_for("Failed")
    assert "The server cannot be reached." in page.text('.note[role="alert"]')
    assert "not begun" in page.text("#seen-body")
    assert server.asked == []
    gate.open()
    server.about_gate = None
    server.script = ["fine", SEEN]
    page.click(".note button")
    page.press(Keys.ENTER)
    page.wait(lambda: page.texts(".numbers"))
    assert page.answer == "fine"


def test_a_message_is_not_sent_to_a_server_that_came_back_in_another_mode(page: Page, server: FakeServer) -> None:
    page.wait_for("Ready")
    server.about = {**server.about, "protection": "open"}
    server.script = ["fine", SEEN]
    page.ask("hello")
    page.wait(lambda: page.texts(".note"))
    assert "at open now, and was at masked. Your message was not sent." in page.text('.note[role="alert"]')
    assert (page.status, page.text("#protection"), server.asked) == ("Ready", "open", [])
    assert "not begun" in page.text("#seen-body")
    assert "nothing is hidden" in page.text("#promise")
    page.click(".note button")
    page.press(Keys.ENTER)
    page.wait(lambda: page.texts(".numbers"))
    assert page.answer == "fine"


def test_a_server_that_came_back_in_another_mode_gives_the_message_to_no_model(page: Page, server: FakeServer) -> None:
    """It said who it is, and was started again before the message came."""
    server.comes_back_at = "open"
    server.script = ["fine", SEEN]
    page.ask("hello")
    page.wait(lambda: page.texts(".note"))
    note = page.text('.note[role="alert"]')
    assert "Protection changed. This server is at open, and another protection was expected." in note
    assert "Your message reached the server and was not given to the model." in note
    assert "not begun" in page.text("#seen-body")
    page.wait(lambda: page.text("#protection") == "open")
    assert "nothing is hidden" in page.text("#promise")
    assert (page.status, page.answer, len(server.asked)) == ("Ready", "", 1)
    page.click(".note button")
    page.press(Keys.ENTER)
    page.wait(lambda: page.texts(".numbers"))
    assert page.answer == "fine"


def test_an_answer_in_another_mode_than_the_page_says_is_not_shown(page: Page, server: FakeServer) -> None:
    """A server that does not look at what the message expects."""
    server.answers_at = "open"
    server.script = ["an answer", SEEN]
    page.ask("hello")
    page.wait(lambda: page.texts(".note"))
    note = page.text('.note[role="alert"]')
    assert "Protection changed." in note
    assert "Your message was sent, and answered at open: the worker may have read it." in note
    assert page.answer == ""
    panel = page.text("#seen-body")
    assert "answered at open: the worker may have read it" in panel
    assert "thrown away" not in panel
    assert "not begun" not in panel
