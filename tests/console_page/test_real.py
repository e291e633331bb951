"""The page at a real server: what it shows is what the API says, and what the worker saw."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest
from selenium.webdriver import Chrome, Keys

from tests.api.mortal import living
from tests.commands import Home, children
from tests.console_page.page import Page
from tests.console_page.real_servers import Cheat, api_text, coming_back, console, mortal
from tests.server.chat_model import chat_model
from tests.server.process import serving

QUESTION = "Who wrote this, and when?"
SEED = 3
TOKENS = 60
ASKED = {"max_tokens": TOKENS, "temperature": 1.0, "seed": SEED}

Open = Callable[..., Page]


@pytest.fixture
def opened(chrome: Chrome) -> Iterator[Open]:
    """Opens the page of a server, with the parameters of ``ASKED``."""
    pages: list[Page] = []

    def open_page(url: str, tokens: int = TOKENS) -> Page:
        page = Page(chrome, url)
        pages.append(page)
        page.wait_for("Ready")
        page.click("#options summary")
        for name, value in (("temperature", "1"), ("max-tokens", str(tokens)), ("seed", str(SEED))):
            page.field(name).clear()
            page.field(name).send_keys(value)
        page.click("#options summary")
        return page

    yield open_page
    for page in pages:
        faults = page.faults()
        page.close()
        assert faults == []


def test_masked_shows_the_apis_text_and_that_the_worker_saw_noise(opened: Open) -> None:
    with console("masked") as url:
        expected = api_text(url, QUESTION, **ASKED)
        page = opened(url)
        page.ask(QUESTION)
        page.wait(lambda: page.texts(".numbers"))
        assert page.answer == expected
        assert (page.text(".headline"), page.text("#protection")) == ("Noise.", "masked")
        assert float(page.one(".p").get_attribute("data-p") or "") > 1e-6
        assert page.text(".recovered") != QUESTION
        page.wait_for("Ready")
        page.click("#reset")
        page.ask(QUESTION)
        page.wait(lambda: page.answer)
        page.press(Keys.ESCAPE)
        page.wait_for("Ready")
        assert expected.startswith(page.answer)


@pytest.mark.slow
def test_open_shows_the_users_words(opened: Open) -> None:
    with console("open") as url:
        expected = api_text(url, QUESTION, **ASKED)
        page = opened(url)
        page.ask(QUESTION)
        page.wait(lambda: page.texts(".numbers"))
        assert page.answer == expected
        assert (page.text(".headline"), page.text(".recovered")) == ("Your words.", QUESTION)


@pytest.mark.slow
def test_an_answer_whose_worker_is_lost_is_paused_and_goes_on_to_the_same_text(opened: Open) -> None:
    with console("masked") as url:
        expected = api_text(url, QUESTION, **ASKED)
    with coming_back(mortal(dies_at=400)) as (address, again), console("masked", address) as url:
        page = opened(url)
        page.ask(QUESTION)
        page.wait_for("Paused")
        assert page.text(".note strong") == "Paused."
        assert page.answer
        assert expected.startswith(page.answer)
        again.set()
        page.wait(lambda: page.texts(".numbers"))
        assert page.answer == expected
        assert page.text(".note strong") == "Went on."


def test_a_worker_that_lies_is_said_to_be_caught(opened: Open) -> None:
    with living(Cheat(at=400)) as address, console("verified", address) as url:
        page = opened(url)
        page.ask(QUESTION)
        page.wait_for("Caught")
        assert page.text('.note[role="alert"] strong') == "A worker or dealer was caught."
        assert page.answer
        assert page.texts(".numbers") == []


@pytest.mark.slow
def test_a_server_of_the_command_line_whose_worker_is_killed(home: Home, opened: Open) -> None:
    options = ("--model", chat_model(), "--served-model-name", "tiny/chat", "--port", 0, "--console")
    with serving(home, *options) as server:
        url = f"{server.address}/"
        expected = api_text(url, QUESTION, **{**ASKED, "max_tokens": 240})
        page = opened(url, 240)
        page.ask(QUESTION)
        page.wait(lambda: page.answer)
        (worker,) = children(server.process.pid)
        os.kill(worker, signal.SIGKILL)
        page.wait_for("Paused")
        page.wait(lambda: page.texts(".numbers"))
        assert page.answer == expected
        assert page.text(".note strong") == "Went on."
        assert page.text(".headline") == "Noise."
