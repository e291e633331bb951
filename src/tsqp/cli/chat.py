"""The conversation of ``tsqp chat``, whatever it is read from and shown on (``terminal.py``).

Covers: an answer that is stopped stays as far as it came, and the conversation goes on (tests/cli/test_chat.py).
Does not cover: keeping a conversation. It is in the memory of this process, and in no file.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tsqp.api.async_llm import AsyncLLM
from tsqp.cli.report import guard_lines
from tsqp.cli.terminal import Lines
from tsqp.errors import InputError
from tsqp.progress_bar import QUIET_S
from tsqp.trusted.engine.sampling_params import SamplingParams
from tsqp.trusted.text.tokenizer import ChatMessage

COMMANDS = {
    "/help": "what can be typed here",
    "/reset": "forget the conversation",
    "/stats": "the last answer in numbers, and the guard's",
    "/exit": "end; so do /quit and Ctrl-D",
}
ENDS = ("/exit", "/quit")
LOOK_S = 0.25  # how often the status of an answer is looked at


@dataclass
class _Answer:
    """One answer as it comes. ``found``: tokens of its prompt that were kept from before; times are of this clock."""

    prompt: int = 0
    found: int = 0
    tokens: int = 0
    text: str = ""
    asked: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    last: float = 0.0

    def take(self, text: str) -> None:
        """One more token, and the text that became certain with it."""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.tokens += 1
        self.text += text

    def numbers(self) -> str | None:
        """A line about it, if there is anything of it."""
        if not self.tokens:
            return None
        spent = self.last - self.first
        rate = f", then {(self.tokens - 1) / spent:.1f} a second" if spent else ""
        return (
            f"prompt of {self.prompt} tokens, {self.found} of them kept from before; "
            f"answer of {self.tokens}, the first after {self.first - self.asked:.2f} s{rate}"
        )


class Chat:
    """One conversation. ``system``: a message that it begins with, also after ``/reset``. ``lora``: who answers."""

    def __init__(
        self,
        model: AsyncLLM,
        params: SamplingParams,
        system: str | None,
        template_args: Mapping[str, Any],
        terminal: Lines,
        lora: str | None = None,
    ) -> None:
        self._model = model
        self._params = params
        self._opening: list[ChatMessage] = [{"role": "system", "content": system}] if system else []
        self._messages = self._opening[:]
        self._template_args = template_args
        self._terminal = terminal
        self._lora = lora
        self._last: str | None = None

    async def hold(self) -> None:
        """The whole conversation; then the model is closed. Raises as ``run``."""
        async with self._model:
            await self.run()

    async def run(self) -> None:
        """Until input or talk ends. Raises PromptError without a chat template, ChannelError, NumericError."""
        question: ChatMessage = {"role": "user", "content": "?"}  # refused before the user types
        self._model.llm.tokenizer.encode_chat([*self._opening, question], **self._template_args)
        self._terminal.welcome(tuple(COMMANDS))
        while (typed := await self._terminal.read()) is not None:
            text = typed.strip()
            if text in ENDS:
                return
            if _is_command(text):
                self._obey(text)
            elif text:
                await self._answer(text)

    def _obey(self, command: str) -> None:
        match command:
            case "/help":
                for line in (*(f"{name:8}{what}" for name, what in COMMANDS.items()), *self._terminal.keys):
                    self._terminal.note(line)
            case "/reset":
                self._messages = self._opening[:]
                self._terminal.note("the conversation is forgotten")
            case "/stats":
                for line in (self._last or "no answer yet", *self._guard_lines()):
                    self._terminal.note(line)
            case _:
                self._terminal.warn(f"there is no {command} here: /help lists what there is")

    def _guard_lines(self) -> list[str]:
        return guard_lines(self._model.llm.stats.as_dict())

    async def _answer(self, text: str) -> None:
        """One turn. It is dropped where it does not fit, or where its answer was stopped before its first word."""
        messages: list[ChatMessage] = [*self._messages, {"role": "user", "content": text}]
        answer = _Answer()
        answering = asyncio.ensure_future(self._stream(messages, answer))
        watching = asyncio.ensure_future(self._watch(answer))
        stopped = False

        def stop() -> None:
            nonlocal stopped
            stopped = answering.cancel()

        try:
            with self._terminal.interrupted(stop):
                await answering
        except asyncio.CancelledError:
            if not stopped:  # the whole conversation was
                raise
        except InputError as error:
            self._terminal.warn(f"{error} (or /reset)")
            return
        finally:
            watching.cancel()
            self._terminal.status(None)
        self._terminal.write("\n")
        self._last = answer.numbers() or self._last
        if stopped:
            self._terminal.note("stopped" if answer.text else "stopped: the question is forgotten")
        if answer.text or not stopped:
            self._messages = [*messages, {"role": "assistant", "content": answer.text}]

    async def _stream(self, messages: list[ChatMessage], answer: _Answer) -> None:
        """Show an answer as it comes."""
        found = self._model.counts().found_tokens
        asked = self._model.open_chat(messages, self._params, lora=self._lora, **self._template_args)
        async with await asked as stream:
            answer.prompt = len(stream.prompt_token_ids)
            try:
                async for delta in stream:
                    answer.found = self._model.counts().found_tokens - found
                    answer.take(delta.text)
                    self._terminal.status(None)
                    self._terminal.write(delta.text)
            except asyncio.CancelledError:
                stream.stop()
                raise

    async def _watch(self, answer: _Answer) -> None:
        """Say what takes long: a prompt that is read, a worker that is waited for."""
        read, paused = self._model.counts().prompt_tokens, False
        await asyncio.sleep(QUIET_S)
        while True:
            state = self._model.worker_state
            waits = state is not None and state.state == "reconnecting"
            if waits and not paused:
                self._terminal.pause("paused: the worker is lost; the answer goes on with the next one")
            elif not waits and not answer.tokens:
                done = self._model.counts().prompt_tokens - read
                self._terminal.status(f"reading the conversation: {done} of {answer.prompt} tokens")
            paused = waits
            await asyncio.sleep(LOOK_S)


def _is_command(text: str) -> bool:
    """One word that begins with a slash and is no path."""
    return text.startswith("/") and "/" not in text[1:] and len(text.split()) == 1
