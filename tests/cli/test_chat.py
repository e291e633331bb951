"""The conversation of ``tsqp chat``, on a terminal that is played: what is kept, stopped, paused and refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import pytest
from rich.console import Console

from tests.server.chat_model import chat_model
from tsqp import LLM, AsyncLLM, ComputeConfig, SamplingParams
from tsqp.api.answer import Delta
from tsqp.api.worker_state import WorkerState
from tsqp.cli import chat as cli_chat
from tsqp.cli.chat import COMMANDS, Chat
from tsqp.cli.terminal import Lines
from tsqp.errors import PromptError
from tsqp.trusted.engine.counts import Counts

PARAMS = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


class Played(Lines):
    """Types what it is told, and remembers all that is shown. Ctrl-C comes after ``stop_after`` pieces of an answer."""

    def __init__(self, *typed: str, stop_after: int | None = None) -> None:
        super().__init__(Console(quiet=True))
        self.typed = list(typed)
        self.shown = ""
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.statuses: list[str | None] = []
        self.stop_after = stop_after
        self._pieces = 0
        self._stop: Callable[[], None] | None = None

    async def read(self) -> str | None:
        return self.typed.pop(0) if self.typed else None

    def write(self, text: str) -> None:
        self.shown += text
        self._pieces += 1
        if self._stop is not None and self._pieces == self.stop_after:
            self._stop()

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def status(self, text: str | None) -> None:
        self.statuses.append(text)

    def interrupted(self, stop: Callable[[], None]) -> AbstractContextManager[None]:
        @contextmanager
        def meanwhile() -> Iterator[None]:
            self._stop, self._pieces = stop, 0
            if self.stop_after == 0:
                stop()
            yield
            self._stop = None

        return meanwhile()


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM(str(chat_model()), protection="local", compute=ComputeConfig(dtype="float32", threads=1)) as llm:
        yield llm


def held(llm: LLM, terminal: Played, system: str | None = None, params: SamplingParams = PARAMS) -> Chat:
    """The chat after a whole conversation; the model stays open."""

    async def hold() -> Chat:
        model = AsyncLLM(llm)
        chat = Chat(model, params, system, {}, terminal)
        await chat.run()
        await model.close()
        return chat

    return asyncio.run(hold())


def texts(chat: Chat) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in chat._messages]


def test_an_answer_becomes_part_of_the_conversation(llm: LLM) -> None:
    terminal = Played("hello\n", "\n", "again\n")
    chat = held(llm, terminal, system="be short")
    assert [role for role, _ in texts(chat)] == ["system", "user", "assistant", "user", "assistant"]
    answers = [content for role, content in texts(chat) if role == "assistant"]
    assert all(answers)
    assert terminal.shown == "".join(f"{answer}\n" for answer in answers)
    with LLM(str(chat_model()), protection="local", compute=ComputeConfig(dtype="float32", threads=1)) as another:
        alone = "".join(delta.text for delta in another.chat([{"role": "user", "content": "hello"}], PARAMS))
    assert alone != answers[0]  # the system message was there


def test_lines_that_were_typed_together_are_one_turn(llm: LLM) -> None:
    chat = held(llm, Played("first\n  second\n"))
    assert texts(chat)[0] == ("user", "first\n  second")


def test_reset_forgets_all_but_the_system_message(llm: LLM) -> None:
    terminal = Played("hello", "/reset", "again")
    chat = held(llm, terminal, system="be short")
    assert [content for role, content in texts(chat) if role != "assistant"] == ["be short", "again"]
    assert "the conversation is forgotten" in terminal.notes


@pytest.mark.parametrize("typed", ["/exit", "/quit", " /quit \n"])
def test_exit_ends_and_nothing_is_read_after_it(typed: str, llm: LLM) -> None:
    terminal = Played(typed, "never")
    assert texts(held(llm, terminal)) == []
    assert terminal.typed == ["never"]


def test_help_names_every_command(llm: LLM) -> None:
    terminal = Played("/help")
    held(llm, terminal)
    assert all(any(note.startswith(name) for note in terminal.notes) for name in COMMANDS)


def test_a_word_that_is_no_command_is_said_and_not_sent(llm: LLM) -> None:
    terminal = Played("/hlep", "/etc/hosts is a path", "/usr/bin")
    chat = held(llm, terminal)
    assert terminal.warnings == ["there is no /hlep here: /help lists what there is"]
    assert [content for role, content in texts(chat) if role == "user"] == ["/etc/hosts is a path", "/usr/bin"]


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(llm: LLM) -> None:
    terminal = Played("hello", "more", stop_after=3)
    chat = held(llm, terminal, params=SamplingParams(max_tokens=1000, temperature=0.0, ignore_eos=True))
    assert terminal.notes == ["stopped", "stopped"]
    (_, first), (_, second) = [(role, content) for role, content in texts(chat) if role == "assistant"]
    assert terminal.shown == f"{first}\n{second}\n"
    assert [role for role, _ in texts(chat)] == ["user", "assistant", "user", "assistant"]


def test_an_answer_that_is_stopped_before_its_first_word_leaves_nothing(llm: LLM) -> None:
    terminal = Played("hello", stop_after=0)
    chat = held(llm, terminal)
    assert terminal.notes == ["stopped: the question is forgotten"]
    assert texts(chat) == []


def test_what_is_computed_of_a_stopped_answer_is_used_again(llm: LLM) -> None:
    terminal = Played("hello " * 40, "/stats", "more", "/stats", stop_after=5)
    held(llm, terminal, params=SamplingParams(max_tokens=1000, temperature=0.0, ignore_eos=True))
    first, second = [note for note in terminal.notes if note.startswith("prompt of")]
    assert ", 0 of them kept" in first
    assert int(second.split(", ")[1].split(" of them")[0]) > 200


def test_a_turn_that_does_not_fit_is_dropped_and_the_conversation_goes_on(llm: LLM) -> None:
    terminal = Played("hello", "x" * 3000, "again")
    chat = held(llm, terminal)
    assert len(terminal.warnings) == 1
    assert "(or /reset)" in terminal.warnings[0]
    assert [content for role, content in texts(chat) if role == "user"] == ["hello", "again"]


def test_stats_before_an_answer(llm: LLM) -> None:
    terminal = Played("/stats")
    held(llm, terminal)
    assert terminal.notes == ["no answer yet"]


class Slow:
    """A model whose answer comes once all that is awaited of the terminal was shown."""

    class Tokens:
        def encode_chat(self, *_: object, **__: object) -> list[int]:
            return [1, 2]

    class Model:
        tokenizer: Any

    def __init__(self, terminal: Played) -> None:
        self.llm = self.Model()
        self.llm.tokenizer = self.Tokens()
        self.worker_state: WorkerState | None = None
        self._terminal = terminal
        self._counts = Counts()

    def counts(self) -> Counts:
        self._counts.prompt_tokens += 1
        return self._counts

    async def open_chat(self, *_: object, **__: object) -> Slow:
        return self

    prompt_token_ids = (1, 2)

    async def __aenter__(self) -> Slow:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while not any(self._terminal.statuses):
            await asyncio.sleep(0)
        self.worker_state = WorkerState("reconnecting", 0.0, "", 1, 0, 1, 0.0, 0, {}, None, False)
        while not self._terminal.notes:
            await asyncio.sleep(0)
        self.worker_state = WorkerState("ready", 0.0, "", 1, 1, 1, 0.0, 0, {}, None, False)
        yield Delta("there")


def test_what_takes_long_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_chat, "QUIET_S", 0.0)
    monkeypatch.setattr(cli_chat, "LOOK_S", 0.0)
    terminal = Played("hello")
    asyncio.run(Chat(cast(AsyncLLM, Slow(terminal)), PARAMS, None, {}, terminal).run())
    first = next(filter(None, terminal.statuses))
    assert first.startswith("reading the conversation: ")
    assert first.endswith(" of 2 tokens")
    assert terminal.notes == ["paused: the worker is lost; the answer goes on with the next one"]
    assert terminal.statuses[-1] is None
    assert terminal.shown == "there\n"


def test_a_conversation_closes_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    llm = LLM(str(chat_model()), protection="local", compute=ComputeConfig(dtype="float32", threads=1))
    close = llm.close

    def closes() -> None:
        closed.append(True)
        close()

    monkeypatch.setattr(llm, "close", closes)
    asyncio.run(Chat(AsyncLLM(llm), PARAMS, None, {}, Played("hello")).hold())
    assert closed


def test_a_model_without_a_template_is_refused_before_anything_is_read() -> None:
    terminal = Played("hello")
    with (
        LLM("synthetic:tiny", protection="local", compute=ComputeConfig(dtype="float32", threads=1)) as llm,
        pytest.raises(PromptError, match="chat template"),
    ):
        held(llm, terminal)
    assert terminal.typed == ["hello"]
