"""The one form of an answer that a receipt is over, read from what a server has sent: whole, or as a stream.

The server reads what it sends by the same code as who checks it. Covers: an answer has the same form whole and as a
stream, and one that broke off has none (tests/tee/test_answer_form.py). Does not cover: log-probabilities, usage, and
the ids of choices, items and calls; none of them is in the form.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from tsqp.errors import EvidenceRefused

MAX_ANSWER_BYTES = 64 << 20
_ENDS = {"response.completed": "stop", "response.incomplete": "length"}

_Index = Annotated[int, msgspec.Meta(ge=0)]


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str = ""


class _ToolCall(msgspec.Struct):
    function: _Function
    index: _Index | None = None


class _Message(msgspec.Struct):
    content: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct):
    index: _Index
    finish_reason: str | None = None
    message: _Message | None = None
    text: str | None = None
    delta: _Message | None = None


class _Part(msgspec.Struct):
    text: str = ""


class _Item(msgspec.Struct):
    type: str
    content: list[_Part] = []
    name: str = ""
    arguments: str = ""


class _Response(msgspec.Struct):
    id: str
    status: str
    output: list[_Item]


class _Sent(msgspec.Struct):
    """A body, or the data of an event, of any of the APIs; what plays no part is left out."""

    id: str | None = None
    type: str | None = None
    choices: list[_Choice] | None = None
    error: Any = None
    status: str | None = None  # of a whole response, as the next
    output: list[_Item] | None = None
    response: _Response | None = None  # of an event, as the next
    item: _Item | None = None
    delta: str | None = None


@dataclass
class _Told:
    """One choice as far as it was read."""

    text: str = ""
    calls: list[list[str]] = field(default_factory=list)  # name and arguments of each
    finish_reason: str | None = None

    def message(self, message: _Message) -> None:
        """More text and more of calls."""
        self.text += message.content or ""
        for place, call in enumerate(message.tool_calls or ()):
            index = place if call.index is None else call.index
            if index == len(self.calls) and call.function.name is not None:
                self.calls.append([call.function.name, ""])
            elif index >= len(self.calls) or call.function.name is not None:
                raise EvidenceRefused("answer", "a call that does not begin", "calls one after another")
            self.calls[index][1] += call.function.arguments

    def items(self, items: list[_Item]) -> None:
        """All items of a response."""
        for item in items:
            if item.type == "function_call":
                self.calls.append([item.name, item.arguments])
            else:
                self.text += "".join(part.text for part in item.content)


_decoder = msgspec.json.Decoder(_Sent)


class AnswerReader:
    """Reads one answer. ``id``: that of the answer, once something was read."""

    def __init__(self) -> None:
        self.id = ""
        self._choices: dict[int, _Told] = {}

    def whole(self, data: bytes) -> None:
        """The body of an answer. Raises EvidenceRefused."""
        sent = self._decoded(data)
        if sent.output is not None and sent.status is not None:
            told = self._choices.setdefault(0, _Told())
            told.items(sent.output)
            told.finish_reason = _ENDS.get(f"response.{sent.status}")
        elif sent.choices is not None:
            self._read(sent.choices)
        else:
            raise EvidenceRefused("answer", "another object", "the body of an answer")

    def event(self, data: bytes) -> None:
        """The data of one event. Raises EvidenceRefused."""
        sent = self._decoded(data)
        if sent.choices is not None:
            self._read(sent.choices)
        elif sent.type is not None:
            self._of_type(sent.type, sent, self._choices.setdefault(0, _Told()))
        else:
            raise EvidenceRefused("answer", "another event", "one of an answer")

    def canonical(self) -> bytes:
        """The form: choices by index, with keys sorted, no spaces, ASCII. Raises EvidenceRefused before the end."""
        if not self._choices or any(told.finish_reason is None for told in self._choices.values()):
            raise EvidenceRefused("answer", "one that broke off", "one that has ended")
        every = [
            {
                "index": index,
                "text": told.text,
                "tool_calls": [{"name": name, "arguments": arguments} for name, arguments in told.calls],
                "finish_reason": told.finish_reason,
            }
            for index, told in sorted(self._choices.items())
        ]
        return json.dumps(every, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()

    def _decoded(self, data: bytes) -> _Sent:
        try:
            sent = _decoder.decode(data)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise EvidenceRefused("answer", f"what cannot be read ({error})", "JSON of an answer") from None
        if sent.error is not None or sent.type == "error":
            raise EvidenceRefused("answer", "an error", "an answer")
        found = sent.id or (None if sent.response is None else sent.response.id)
        self.id = self.id or found or ""
        return sent

    def _read(self, choices: list[_Choice]) -> None:
        for choice in choices:
            told = self._choices.setdefault(choice.index, _Told())
            if told.finish_reason is not None:
                raise EvidenceRefused("answer", "a choice that goes on after its end", "one that ends once")
            told.text += choice.text or ""
            for message in (choice.message, choice.delta):
                if message is not None:
                    told.message(message)
            told.finish_reason = choice.finish_reason

    def _of_type(self, type: str, sent: _Sent, told: _Told) -> None:
        """An event of the responses API. The last one repeats the answer, and has to repeat what came before."""
        if told.finish_reason is not None:
            raise EvidenceRefused("answer", "an event after the last one", "an answer that ends once")
        if type == "response.output_text.delta":
            told.text += sent.delta or ""
        elif type == "response.output_item.added" and sent.item is not None and sent.item.type == "function_call":
            told.calls.append([sent.item.name, ""])
        elif type == "response.function_call_arguments.delta":
            if not told.calls:
                raise EvidenceRefused("answer", "arguments without a call", "arguments after their call")
            told.calls[-1][1] += sent.delta or ""
        elif type in _ENDS and sent.response is not None:
            again = _Told()
            again.items(sent.response.output)
            if (again.text, again.calls) != (told.text, told.calls):
                raise EvidenceRefused("answer", "a last event with another answer", "what the events before it say")
            told.finish_reason = _ENDS[type]


def read_answer(data: bytes) -> bytes:
    """The form of an answer in a file: the body, or the text of an event stream. Raises EvidenceRefused."""
    if len(data) > MAX_ANSWER_BYTES:
        raise EvidenceRefused("answer", f"{len(data)} bytes or more", f"at most {MAX_ANSWER_BYTES}")
    reader = AnswerReader()
    if data.lstrip().startswith(b"{"):
        reader.whole(data)
    else:
        for event in _events(data):
            reader.event(event)
    return reader.canonical()


def _events(data: bytes) -> Iterator[bytes]:
    """The data of each event; comments and the end mark are none. A line of data is a whole event here."""
    for line in data.splitlines():
        if line.startswith(b"data:"):
            value = line.removeprefix(b"data:").strip()
            if value != b"[DONE]":
                yield value
