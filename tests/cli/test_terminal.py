"""What is typed on a terminal and what is shown there, with keys that are played."""

from __future__ import annotations

import asyncio
import io
import signal
import sys

import pytest
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from tsqp.cli.terminal import Lines, Screen, terminal_for
from tsqp.errors import PromptError

UP, ALT_ENTER, CTRL_C, CTRL_D, CTRL_U = "\x1b[A", "\x1b\r", "\x03", "\x04", "\x15"


def read(typed: str, times: int = 1) -> tuple[list[str | None], str]:
    """What was read, and what was said meanwhile."""
    said = io.StringIO()

    async def all_of_it(one: Screen) -> list[str | None]:
        return [await one.read() for _ in range(times)]

    with create_pipe_input() as keys:
        one = Screen(Console(file=said), source=keys, sink=DummyOutput())
        one.welcome(["/help", "/exit"])
        keys.send_text(typed)
        return asyncio.run(all_of_it(one)), said.getvalue()


def test_enter_sends() -> None:
    assert read("hello\r")[0] == ["hello"]


@pytest.mark.parametrize("key", [ALT_ENTER, "\n"], ids=["alt-enter", "ctrl-j"])
def test_a_new_line_is_begun_by_a_key_of_its_own(key: str) -> None:
    assert read(f"first{key}second\r")[0] == ["first\nsecond"]


def test_pasted_lines_stay_together() -> None:
    assert read("\x1b[200~one\ntwo\n\x1b[201~\r")[0] == ["one\ntwo\n"]


async def until(one: Screen, keys: PipeInput, typed: str, text: str) -> None:
    """Type something again until the line is as it is to be: history and completions are looked up meanwhile."""
    while not one._session.app.is_running:
        await asyncio.sleep(0)
    while one._session.default_buffer.text != text:
        keys.send_text(typed)
        for _ in range(100):
            await asyncio.sleep(0)


def played(typed: str, text: str, before: str = "") -> str | None:
    """What is read after a line ``before``, where ``typed`` makes it ``text``."""

    async def all_of_it(one: Screen, keys: PipeInput) -> str | None:
        if before:
            keys.send_text(f"{before}\r")
            await one.read()
        reading = asyncio.ensure_future(one.read())
        await until(one, keys, typed, text)
        keys.send_text("!\r")
        return await reading

    with create_pipe_input() as keys:
        one = Screen(Console(quiet=True), source=keys, sink=DummyOutput())
        one.welcome(["/help", "/exit"])
        return asyncio.run(all_of_it(one, keys))


def test_what_was_typed_before_comes_back() -> None:
    assert played(UP, "hello", before="hello") == "hello!"


def test_ctrl_c_clears_what_is_typed_and_says_how_to_end() -> None:
    typed, said = read(f"wrong{CTRL_C}right\r")
    assert typed == ["right"]
    assert "Ctrl-D or /exit ends" in said


def test_ctrl_d_ends() -> None:
    assert read(CTRL_D)[0] == [None]


def test_tab_completes_a_command() -> None:
    assert played(f"{CTRL_U}/he\t", "/help") == "/help!"


def test_control_characters_of_an_answer_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    Screen(Console(quiet=True)).write("a\x1b[2Jb\rc\td\ne\u200d\u00e9\x9b")
    assert (
        capsys.readouterr().out
        == "a\N{REPLACEMENT CHARACTER}[2Jb\N{REPLACEMENT CHARACTER}c\td\ne\u200d\u00e9\N{REPLACEMENT CHARACTER}"
    )


def test_a_pipe_gets_the_answer_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    Lines(Console(quiet=True)).write("a\x1b[2J")
    assert capsys.readouterr().out == "a\x1b[2J"


def test_ctrl_c_stops_once_and_then_ends_the_program() -> None:
    stops: list[bool] = []

    async def answer() -> None:
        with Screen(Console(quiet=True)).interrupted(lambda: stops.append(True)):
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(0.01)
            assert stops == [True]
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(answer())
    assert stops == [True]


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_afterwards_ctrl_c_is_what_it_was(handler: signal.Handlers) -> None:
    """Also where it was ignored, as by a program that a shell has started in the background."""

    async def answer() -> None:
        with Screen(Console(quiet=True)).interrupted(lambda: None):
            pass

    before = signal.signal(signal.SIGINT, handler)
    try:
        asyncio.run(answer())
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_status_goes_when_there_is_something_to_show() -> None:
    said = io.StringIO()
    one = Screen(Console(file=said, force_terminal=True))
    one.status("reading: 1 of 2")
    one.status("reading: 2 of 2")
    one.status(None)
    one.status(None)
    assert "reading" in said.getvalue()
    assert said.getvalue().endswith("\x1b[2K")  # the line is empty again


def test_a_pipe_is_no_terminal_and_bytes_that_are_no_text_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\n\xff\n"), encoding="utf-8"))
    one = terminal_for(Console(quiet=True))
    assert type(one) is Lines
    with pytest.raises(PromptError, match="UTF-8"):
        asyncio.run(one.read())
