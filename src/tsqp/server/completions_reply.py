"""Answers of the completions API: as a whole, and as pieces. Both are made of the same pieces."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from msgspec import UNSET, UnsetType

from tsqp.server.answers import Answers
from tsqp.server.completions_types import Choice, Completion, CompletionBody
from tsqp.server.logprobs import Shown, TextLogprobs, completion_logprobs, prompt_tokens
from tsqp.server.service import Service
from tsqp.server.streams import Event
from tsqp.server.usage import Usage

if TYPE_CHECKING:
    from tsqp.api.answer import Delta


class _Choice:
    """One answer as it is read. Its first piece has its prompt, where that is told again.

    Where no token was asked for, the one that is made all the same is not told of.
    """

    def __init__(self, index: int, service: Service, body: CompletionBody, prompt: list[int], text: str | None) -> None:
        self._index = index
        self._tokenizer = service.tokenizer
        self._prompt = prompt
        self._echo = "" if not body.echo else service.tokenizer.decode(prompt) if text is None else text
        self._silent = body.max_tokens == 0
        self._logprobs = None
        if body.logprobs is not None:
            end = bool(body.echo)
            self._logprobs = TextLogprobs(service.tokenizer, len(self._echo), with_end=end, after=prompt)
        self.tokens = 0  # of the answer

    def piece(self, delta: Delta) -> tuple[str, list[Shown], str | None]:
        """Its text, the tokens that are shown with it, and why the answer ends, if it does."""
        text, self._echo = self._echo, ""
        shown = (
            [] if delta.prompt_logprobs is None else prompt_tokens(self._tokenizer, self._prompt, delta.prompt_logprobs)
        )
        if self._silent:
            return text, shown, "length"
        if self._logprobs is not None:
            shown += self._logprobs.push(delta)
        if delta.completion is not None:
            self.tokens = len(delta.completion.token_ids)
        return text + delta.text, shown, None if delta.completion is None else delta.completion.finish_reason

    def made(self, text: str, shown: Iterable[Shown], reason: str | None) -> Choice:
        """As the API has it."""
        return Choice(self._index, text, None if self._logprobs is None else completion_logprobs(shown), reason)


class Reply:
    """What is told of the answers to one request. ``prompts``: the tokens of each, and its text where it had one."""

    def __init__(self, service: Service, body: CompletionBody, prompts: Sequence[tuple[list[int], str | None]]) -> None:
        self._service = service
        self._model = service.name_in_answers(body.model)
        self._id = f"cmpl-{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._with_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._prompt_tokens = sum(len(tokens) for tokens, _ in prompts)
        self._choices: list[_Choice] = []
        for tokens, text in prompts:
            for _ in range(body.choices):
                self._choices.append(_Choice(len(self._choices), service, body, tokens, text))

    async def whole(self, answers: Answers) -> Completion:
        """All answers, once they are complete."""
        texts = ["" for _ in self._choices]
        shown: list[list[Shown]] = [[] for _ in self._choices]
        reasons: list[str | None] = [None for _ in self._choices]
        async with aclosing(answers.pieces()) as pieces:
            async for index, delta in pieces:
                text, more, reasons[index] = self._choices[index].piece(delta)
                texts[index] += text
                shown[index] += more
        every = zip(self._choices, texts, shown, reasons, strict=True)
        made = [choice.made(text, tokens, reason) for choice, text, tokens, reason in every]
        return self._completion(made, self._usage())

    async def events(self, answers: Answers) -> AsyncGenerator[Event, None]:
        """The pieces, and the usage where it was asked for."""
        usage: UnsetType | None = None if self._with_usage else UNSET
        async with aclosing(answers.pieces()) as pieces:
            async for index, delta in pieces:
                text, shown, reason = self._choices[index].piece(delta)
                if text or shown or reason:
                    yield Event(self._completion([self._choices[index].made(text, shown, reason)], usage))
        if self._with_usage:
            yield Event(self._completion([], self._usage()))

    def _completion(self, choices: list[Choice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(self._id, self._created, self._model, self._service.fingerprint, choices, usage)

    def _usage(self) -> Usage:
        return Usage.of(self._prompt_tokens, sum(choice.tokens for choice in self._choices))
