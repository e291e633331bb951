"""Answers of the responses API: items and their events. A whole answer is made of the same events as a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from itertools import count
from typing import TYPE_CHECKING, Any

import msgspec

from tsqp.server.answers import Answers
from tsqp.server.handlers import translated
from tsqp.server.logprobs import TextLogprobs, TopLogprobs, chat_logprobs
from tsqp.server.responses_types import (
    Incomplete,
    OutputCall,
    OutputMessage,
    OutputText,
    Response,
    ResponseEvent,
    ResponsesBody,
    ResponsesUsage,
    TextConfig,
    TextFormat,
)
from tsqp.server.service import Service
from tsqp.server.streams import Event
from tsqp.server.tools import CallReader, ToolUse
from tsqp.trusted.text.tool_calls import CallArguments, CallStart, Text

if TYPE_CHECKING:
    from tsqp.api.answer import Completion


class Reply:
    """What is told of the answer to one request."""

    def __init__(self, service: Service, body: ResponsesBody, tools: ToolUse | None, prompt_tokens: int) -> None:
        self._reader = CallReader(tools)
        self._logprobs = TextLogprobs(service.tokenizer) if body.include else None
        self._held: list[TopLogprobs] = []  # until it is decided whether their tokens are of a text or of a call
        self._prompt_tokens = prompt_tokens
        self._numbers = count()
        self._items: list[OutputMessage | OutputCall] = []
        self._open: OutputMessage | OutputCall | None = None  # the item that is being written
        self._response = Response(
            id=f"resp_{secrets.token_hex(16)}",
            created_at=int(time.time()),
            status="in_progress",
            model=service.name_in_answers(body.model),
            system_fingerprint=service.fingerprint,
            output=[],
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls is not False,
            temperature=1.0 if body.temperature is None else body.temperature,
            text=body.text
            if body.text is not None and body.text.format
            else TextConfig(format=TextFormat(type="text")),
            tool_choice="auto" if body.tool_choice is None else body.tool_choice,
            tools=body.tools or [],
            top_logprobs=body.top_logprobs or 0,
            top_p=1.0 if body.top_p is None else body.top_p,
        )

    async def whole(self, answers: Answers) -> Response:
        """The response, once it is complete."""
        async with aclosing(self._told(answers)) as events:
            async for _ in events:
                pass
        return self._response

    async def events(self, answers: Answers) -> AsyncGenerator[Event, None]:
        """All events. Where the answer fails, the last one is an error, in this API's shape and in that of all APIs."""
        try:
            async with aclosing(self._told(answers)) as events:
                async for event in events:
                    yield Event(event, event.type)
        except Exception as error:
            body = translated(error).body
            event = self._event("error", message=body.message, code=body.code, param=body.param, error=body)
            yield Event(event, event.type)

    async def _told(self, answers: Answers) -> AsyncGenerator[ResponseEvent, None]:
        yield self._event("response.created", response=self._response)
        yield self._event("response.in_progress", response=self._response)
        async with aclosing(answers.pieces()) as pieces:
            async for _, delta in pieces:
                if self._logprobs is not None:
                    self._held += chat_logprobs(self._logprobs.push(delta))
                for event in self._reader.push(delta):
                    match event:
                        case Text():
                            for told in self._add_text(event.text):
                                yield told
                        case CallStart():
                            for told in self._begin_call(event.name):
                                yield told
                        case CallArguments():
                            yield self._add_arguments(event.text)
                if isinstance(self._open, OutputCall):
                    self._held = []
                if delta.completion is not None:
                    for told in self._end(delta.completion):
                        yield told

    def _add_text(self, text: str) -> Iterator[ResponseEvent]:
        if not isinstance(self._open, OutputMessage):
            yield from self._close("completed")
            message = OutputMessage(f"msg_{secrets.token_hex(16)}", "in_progress", [])
            yield self._event("response.output_item.added", output_index=len(self._items), item=message)
            self._open = msgspec.structs.replace(message, content=[OutputText("", [])])
            yield self._of_part("response.content_part.added", part=self._open.content[0])
        (part,) = self._open.content
        logprobs, self._held = self._held, []
        self._open = msgspec.structs.replace(
            self._open, content=[OutputText(part.text + text, part.logprobs + logprobs)]
        )
        if text or logprobs:
            yield self._of_part("response.output_text.delta", delta=text, logprobs=logprobs)

    def _begin_call(self, name: str) -> Iterator[ResponseEvent]:
        yield from self._close("completed")
        ids = f"fc_{secrets.token_hex(16)}", f"call_{secrets.token_hex(12)}"
        self._open = OutputCall(ids[0], "in_progress", ids[1], name, "")
        yield self._event("response.output_item.added", output_index=len(self._items), item=self._open)

    def _add_arguments(self, text: str) -> ResponseEvent:
        call = self._open
        if not isinstance(call, OutputCall):
            raise TypeError("arguments come after the beginning of their call")
        self._open = msgspec.structs.replace(call, arguments=call.arguments + text)
        return self._of_item("response.function_call_arguments.delta", delta=text)

    def _close(self, status: str) -> Iterator[ResponseEvent]:
        """The item that is being written has ended."""
        match self._open:
            case None:
                return
            case OutputMessage(content=[part]):
                yield self._of_part("response.output_text.done", text=part.text, logprobs=part.logprobs)
                yield self._of_part("response.content_part.done", part=part)
            case OutputCall(name=name, arguments=arguments):
                yield self._of_item("response.function_call_arguments.done", name=name, arguments=arguments)
        item = msgspec.structs.replace(self._open, status=status)
        yield self._event("response.output_item.done", output_index=len(self._items), item=item)
        self._items.append(item)
        self._open = None

    def _end(self, completion: Completion) -> Iterator[ResponseEvent]:
        status = "incomplete" if completion.finish_reason == "length" else "completed"
        if self._held or (self._open is None and not self._items):
            yield from self._add_text("")  # an answer has an item
        yield from self._close(status)
        prompt, answer = self._prompt_tokens, len(completion.token_ids)
        self._response = msgspec.structs.replace(
            self._response,
            status=status,
            output=self._items,
            usage=ResponsesUsage(prompt, answer, prompt + answer),
            incomplete_details=Incomplete() if status == "incomplete" else None,
        )
        yield self._event(f"response.{status}", response=self._response)

    def _of_part(self, type: str, **fields: Any) -> ResponseEvent:
        return self._of_item(type, content_index=0, **fields)

    def _of_item(self, type: str, **fields: Any) -> ResponseEvent:
        item_id = "" if self._open is None else self._open.id
        return self._event(type, item_id=item_id, output_index=len(self._items), **fields)

    def _event(self, type: str, **fields: Any) -> ResponseEvent:
        return ResponseEvent(type=type, sequence_number=next(self._numbers), **fields)
