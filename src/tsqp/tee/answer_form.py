"""The one form of an answer that a receipt is over, read from what a server has sent: whole, or as a stream.

The server reads what it sends by the same code as who checks it. Covers: an answer has the same form whole and as a
stream; one that broke off has none, nor one with a text where clients of its endpoint do not look, or where they look
and the form does not (tests/tee/test_answer_form.py). Does not cover: log-probabilities, usage, and the ids of choices,
items and calls; none of them is in the form.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from tsqp.errors import EvidenceRefused
from tsqp.tee.receipts import Path

MAX_ANSWER_BYTES = 64 << 20
_ENDS = {"response.completed": "stop", "response.incomplete": "length"}
_EVENTS = {  # of the responses API, as the server makes them
    *_ENDS,
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.output_item.done",
    "response.content_part.added",
    "response.content_part.done",
    "response.output_text.delta",
    "response.output_text.done",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
}

_Index = Annotated[int, msgspec.Meta(ge=0)]

# What an endpoint sends has one place for its text. The places of the others are null here, so that no answer has a
# text beside the one that its reader sees.


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str = ""


class _ToolCall(msgspec.Struct):
    function: _Function
    index: _Index | None = None


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    content: str | None = None
    tool_calls: list[_ToolCall] | None = None
    role: str | None = None
    refusal: None = None


class _Choice(msgspec.Struct, kw_only=True):
    index: _Index
    finish_reason: str | None = None


class _ChatChoice(_Choice, kw_only=True):
    message: _Message
    delta: None = None
    text: None = None


class _ChatPiece(_Choice, kw_only=True):
    delta: _Message
    message: None = None
    text: None = None


class _TextChoice(_Choice, kw_only=True):
    text: str
    message: None = None
    delta: None = None


class _Part(msgspec.Struct, forbid_unknown_fields=True, tag="output_text"):
    text: str
    logprobs: Any = None
    annotations: Any = None


class _MessageItem(msgspec.Struct, tag="message"):
    content: list[_Part]


class _CallItem(msgspec.Struct, tag="function_call"):
    name: str
    arguments: str


_Item = _MessageItem | _CallItem
_Said = tuple[str, ...]


class _Sent(msgspec.Struct, kw_only=True):
    """A body, or the data of an event; what plays no part is left out."""

    id: str | None = None
    error: Any = None


class _Chat(_Sent, kw_only=True):
    choices: list[_ChatChoice] | None = None
    output: None = None


class _ChatChunk(_Sent, kw_only=True):
    choices: list[_ChatPiece] | None = None
    output: None = None


class _Completions(_Sent, kw_only=True):
    """Whole, and as an event."""

    choices: list[_TextChoice] | None = None
    output: None = None


class _Response(_Sent, kw_only=True):
    status: str | None = None
    output: list[_Item] | None = None
    choices: None = None


class _ResponseEvent(_Sent, kw_only=True):
    type: str | None = None
    response: _Response | None = None
    item: _Item | None = None
    part: _Part | None = None
    delta: str | None = None
    text: str | None = None
    arguments: str | None = None
    choices: None = None
    output: None = None


_BODIES: dict[Path, msgspec.json.Decoder[Any]] = {
    "/v1/chat/completions": msgspec.json.Decoder(_Chat),
    "/v1/completions": msgspec.json.Decoder(_Completions),
    "/v1/responses": msgspec.json.Decoder(_Response),
}
_OF_EVENTS: dict[Path, msgspec.json.Decoder[Any]] = {
    "/v1/chat/completions": msgspec.json.Decoder(_ChatChunk),
    "/v1/completions": msgspec.json.Decoder(_Completions),
    "/v1/responses": msgspec.json.Decoder(_ResponseEvent),
}


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
            if isinstance(item, _CallItem):
                self.calls.append([item.name, item.arguments])
            else:
                self.text += "".join(part.text for part in item.content)


class AnswerReader:
    """Reads one answer of the endpoint ``path``. ``id``: that of the answer, once something was read."""

    def __init__(self, path: Path) -> None:
        self.id = ""
        self._path: Path = path
        self._choices: dict[int, _Told] = {}
        self._done: set[_Said] = set()  # by events that repeat a part of a response

    def whole(self, data: bytes) -> None:
        """The body of an answer. Raises EvidenceRefused."""
        sent = self._decoded(_BODIES[self._path], data)
        if sent.choices is not None:
            self._read(sent.choices)
        elif isinstance(sent, _Response) and sent.output is not None:
            told = self._choices.setdefault(0, _Told())
            told.items(sent.output)
            told.finish_reason = _ENDS.get(f"response.{sent.status}")
        else:
            raise EvidenceRefused("answer", "another object", f"the body of an answer of {self._path}")

    def event(self, data: bytes) -> None:
        """The data of one event. Raises EvidenceRefused."""
        sent = self._decoded(_OF_EVENTS[self._path], data)
        if sent.choices is not None:
            self._read(sent.choices)
        elif isinstance(sent, _ResponseEvent) and sent.type in _EVENTS:
            self._of_type(sent.type, sent, self._choices.setdefault(0, _Told()))
        else:
            raise EvidenceRefused("answer", "another event", f"one of an answer of {self._path}")

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

    def _decoded(self, decoder: msgspec.json.Decoder[Any], data: bytes) -> Any:
        try:
            sent = decoder.decode(data)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise EvidenceRefused("answer", f"what cannot be read ({error})", f"JSON of {self._path}") from None
        if sent.error is not None:
            raise EvidenceRefused("answer", "an error", "an answer")
        found = sent.id
        if isinstance(sent, _ResponseEvent):
            if sent.type == "error":
                raise EvidenceRefused("answer", "an error", "an answer")
            found = None if sent.response is None else sent.response.id
        self.id = self.id or found or ""
        return sent

    def _read(self, choices: list[_ChatChoice] | list[_ChatPiece] | list[_TextChoice]) -> None:
        for choice in choices:
            told = self._choices.setdefault(choice.index, _Told())
            if told.finish_reason is not None:
                raise EvidenceRefused("answer", "a choice that goes on after its end", "one that ends once")
            match choice:
                case _ChatChoice():
                    told.message(choice.message)
                case _ChatPiece():
                    told.message(choice.delta)
                case _TextChoice():
                    told.text += choice.text
            told.finish_reason = choice.finish_reason

    def _of_type(self, type: str, sent: _ResponseEvent, told: _Told) -> None:
        """An event of the responses API. The last one repeats the answer, and has to repeat what came before."""
        if told.finish_reason is not None:
            raise EvidenceRefused("answer", "an event after the last one", "an answer that ends once")
        if type == "response.output_text.delta":
            told.text += sent.delta or ""
        elif type == "response.function_call_arguments.delta":
            if not told.calls:
                raise EvidenceRefused("answer", "arguments without a call", "arguments after their call")
            told.calls[-1][1] += sent.delta or ""
        elif type in _ENDS:
            self._end(type, [] if sent.response is None else sent.response.output or [], told)
        elif type.endswith(".done"):
            self._done |= _repeated(sent)
        else:
            self._begin(sent, told)

    def _begin(self, sent: _ResponseEvent, told: _Told) -> None:
        """Of a response, an item or a part: nothing is in it yet."""
        begun = _Told()
        begun.items([] if sent.response is None else sent.response.output or [])
        begun.items([] if sent.item is None else [sent.item])
        begun.items([] if sent.part is None else [_MessageItem([sent.part])])
        if begun.text or any(arguments for _, arguments in begun.calls):
            raise EvidenceRefused("answer", "an event that begins with a text", "texts as deltas")
        told.calls += begun.calls

    def _end(self, type: str, output: list[_Item], told: _Told) -> None:
        again = _Told()
        again.items(output)
        said: set[_Said] = set().union(*map(_said, output))
        if (again.text, again.calls) != (told.text, told.calls) or not self._done <= said:
            raise EvidenceRefused("answer", "a last event with another answer", "what the events before it say")
        told.finish_reason = _ENDS[type]


def _said(item: _Item) -> set[_Said]:
    """What events that repeat an item, or a part of one, may say."""
    if isinstance(item, _CallItem):
        return {("call", item.name, item.arguments), ("arguments", item.arguments)}
    texts = [part.text for part in item.content]
    return {("message", *texts), *(("part", text) for text in texts)}


def _repeated(sent: _ResponseEvent) -> set[_Said]:
    found = set() if sent.item is None else _said(sent.item)
    texts = (sent.text, None if sent.part is None else sent.part.text)
    found |= {("part", text) for text in texts if text is not None}
    return found if sent.arguments is None else found | {("arguments", sent.arguments)}


def read_answer(data: bytes, path: Path) -> bytes:
    """The form of an answer in a file: the body, or the text of an event stream, as the endpoint ``path`` sends it.

    Raises EvidenceRefused.
    """
    if len(data) > MAX_ANSWER_BYTES:
        raise EvidenceRefused("answer", f"{len(data)} bytes or more", f"at most {MAX_ANSWER_BYTES}")
    reader = AnswerReader(path)
    if data.lstrip().startswith(b"{"):
        reader.whole(data)
    else:
        for event in _events(data):
            reader.event(event)
    return reader.canonical()


def _events(data: bytes) -> Iterator[bytes]:
    """The data of each event; comments are none. A line of data is a whole event here. Raises EvidenceRefused."""
    ended = False
    for line in data.splitlines():
        if line.startswith(b"data:"):
            if ended:  # clients do not read on
                raise EvidenceRefused("answer", "one that goes on after its end mark", "one that ends once")
            value = line.removeprefix(b"data:").strip()
            ended = value == b"[DONE]"
            if not ended:
                yield value
