"""``tsqp chat`` on a real terminal: a process behind a pseudoterminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.cli.pseudoterminal import CTRL_C, CTRL_D, Screen, behind_terminal
from tests.commands import TSQP, Home
from tests.server.chat_model import chat_model

pytestmark = pytest.mark.slow  # a process that loads a model, and waits for keys

READS, HAS_READ = rb"\x1b\[\?2004h", rb"\x1b\[\?2004l"  # pasting in brackets, while keys are awaited
OPTIONS = ("--protection", "local", "--dtype", "float32", "--threads", "1", "--ignore-eos", "-n", "1900")


@contextlib.contextmanager
def chat(home: Home) -> Iterator[Screen]:
    command = [*TSQP, "chat", "--model", str(chat_model()), *OPTIONS]
    with behind_terminal(command, {**home.environment, "PROMPT_TOOLKIT_NO_CPR": "1"}) as screen:
        yield screen


def test_what_is_typed_while_the_model_loads_is_sent_line_by_line(home: Home) -> None:
    """The terminal itself has taken each Enter by then, as a line feed, which begins a new line where keys are read."""
    chat_model()
    with chat(home) as screen:
        screen.type(b"/stats\rhel\x1b[Dlo\r")
        screen.until(rb"/help says")
        screen.until(rb"no answer yet")
        screen.until(rb"> he.*l")
        screen.until(HAS_READ)
        screen.until(rb".{40}")
        screen.type(CTRL_C)
        screen.until(rb"stopped")
        screen.until(READS)
        screen.type(CTRL_D)
        assert screen.ended() == 0


def test_ctrl_d_while_the_model_loads_ends_the_chat(home: Home) -> None:
    chat_model()
    with chat(home) as screen:
        screen.type(CTRL_D)
        screen.until(rb"/help says")
        assert screen.ended() == 0


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(home: Home) -> None:
    chat_model()  # made here and not in the child
    with chat(home) as screen:
        screen.until(rb"/help says")
        screen.until(READS)
        screen.type(b"hello\r")
        screen.until(HAS_READ)
        screen.until(rb".{40}")  # an answer has begun
        screen.type(CTRL_C)
        screen.until(rb"stopped")
        screen.until(READS)
        screen.type(b"/stats\r")
        found = screen.until(rb"prompt of (\d+) tokens, (\d+) of them kept from before; answer of (\d+)")
        assert 0 < int(found[3]) < 1900
        screen.until(READS)
        screen.type(CTRL_C)
        screen.until(rb"Ctrl-D or /exit ends the chat")
        screen.until(READS)
        screen.type(CTRL_D)
        screen.until(HAS_READ)
        assert screen.ended() == 0
