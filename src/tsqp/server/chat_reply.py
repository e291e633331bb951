"""Answers of the chat API: as a whole, and as chunks. Both are made of the same pieces."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

import msgspec
from msgspec import UNSET, UnsetType

from tsqp.server.answers import Answers
from tsqp.server.chat_types import (
    Answer,
    ChatBody,
    Choice,
    ChoicePiece,
    Chunk,
    Completion,
    FunctionCall,
    Logprobs,
    Piece,
    ToolCall,
)
from tsqp.server.logprobs import TextLogprobs, TopLogprobs, chat_logprobs
from tsqp.server.service import Service
from tsqp.server.streams import Event
from tsqp.server.tools import CallReader, ToolUse
from tsqp.server.usage import Usage
from tsqp.trusted.text.tool_calls import CallArguments, CallStart, Text, collect
from tsqp.trusted.text.tool_calls import Event as AnswerEvent

if TYPE_CHECKING:
    from tsqp.api.answer import Delta


class _Choice:
    """One answer as it is read."""

    def __init__(self, service: Service, body: ChatBody, tools: ToolUse | None) -> None:
        self.reader = CallReader(tools)
        self._logprobs = TextLogprobs(service.tokenizer) if body.logprobs else None
        self.call_ids: list[str] = []

    def logprobs(self, delta: Delta) -> list[TopLogprobs]:
        return [] if self._logprobs is None else chat_logprobs(self._logprobs.push(delta))

    def call_id(self, index: int) -> str:
        while len(self.call_ids) <= index:
            self.call_ids.append(f"call_{secrets.token_hex(12)}")
        return self.call_ids[index]


class Reply:
    """What is told of the answers to one request."""

    def __init__(self, service: Service, body: ChatBody, tools: ToolUse | None, prompt_tokens: int) -> None:
        self._service = service
        self._model = service.name_in_answers(body.model)
        self._id = f"chatcmpl-{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._choices = [_Choice(service, body, tools) for _ in range(body.choices)]
        self._with_logprobs = bool(body.logprobs)
        self._with_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._prompt_tokens = prompt_tokens
        self._answer_tokens = 0

    @property
    def answer_tokens(self) -> int:
        """Of the answers that have ended."""
        return self._answer_tokens

    async def whole(self, answers: Answers) -> Completion:
        """All answers, once they are complete."""
        events: list[list[AnswerEvent]] = [[] for _ in self._choices]
        logprobs: list[list[TopLogprobs]] = [[] for _ in self._choices]
        reasons = ["" for _ in self._choices]
        async with aclosing(answers.pieces()) as pieces:
            async for index, delta in pieces:
                choice = self._choices[index]
                events[index] += choice.reader.push(delta)
                logprobs[index] += choice.logprobs(delta)
                if delta.completion is not None:
                    self._answer_tokens += len(delta.completion.token_ids)
                    reasons[index] = choice.reader.finish_reason(delta.completion.finish_reason)
        choices = [
            Choice(
                index,
                self._message(choice, events[index]),
                reasons[index],
                Logprobs(logprobs[index]) if self._with_logprobs else None,
            )
            for index, choice in enumerate(self._choices)
        ]
        return Completion(self._id, self._created, self._model, self._service.fingerprint, choices, self._usage())

    async def events(self, answers: Answers) -> AsyncGenerator[Event, None]:
        """The chunks: a role for each answer, its pieces, its end, and the usage where it was asked for."""
        for index in range(len(self._choices)):
            yield self._chunk(ChoicePiece(index, Piece(role="assistant", content="")))
        async with aclosing(answers.pieces()) as pieces:
            async for index, delta in pieces:
                for piece in self._pieces(index, delta):
                    yield self._chunk(piece)
        if self._with_usage:
            yield self._chunk(None)

    def _pieces(self, index: int, delta: Delta) -> list[ChoicePiece]:
        """What a piece of the answer is in chunks: log-probabilities are in the first of them."""
        choice = self._choices[index]
        news = [self._news(choice, event) for event in choice.reader.push(delta)]
        entries = choice.logprobs(delta)
        if entries and not news:
            news = [Piece(content="")]
        pieces = [ChoicePiece(index, one) for one in news]
        if entries:
            pieces[0] = msgspec.structs.replace(pieces[0], logprobs=Logprobs(entries))
        if delta.completion is not None:
            self._answer_tokens += len(delta.completion.token_ids)
            reason = choice.reader.finish_reason(delta.completion.finish_reason)
            pieces.append(ChoicePiece(index, Piece(), finish_reason=reason))
        return pieces

    def _news(self, choice: _Choice, event: AnswerEvent) -> Piece:
        match event:
            case Text():
                return Piece(content=event.text)
            case CallStart():
                function = FunctionCall("", event.name)
                return Piece(tool_calls=[ToolCall(function, event.index, choice.call_id(event.index), "function")])
            case CallArguments():
                return Piece(tool_calls=[ToolCall(FunctionCall(event.text), event.index)])

    def _message(self, choice: _Choice, events: Sequence[AnswerEvent]) -> Answer:
        text, calls = collect(events)
        if not calls:
            return Answer(text)
        called = [
            ToolCall(FunctionCall(call.arguments, call.name), UNSET, choice.call_id(index), "function")
            for index, call in enumerate(calls)
        ]
        return Answer(text or None, called)

    def _chunk(self, piece: ChoicePiece | None) -> Event:
        """``piece``: None for the last one, which has the usage."""
        usage: Usage | UnsetType | None = None if self._with_usage else UNSET
        if piece is None:
            usage = self._usage()
        choices = [] if piece is None else [piece]
        return Event(Chunk(self._id, self._created, self._model, self._service.fingerprint, choices, usage))

    def _usage(self) -> Usage:
        return Usage.of(self._prompt_tokens, self._answer_tokens)
