"""Tool calls in the text of an answer, as it comes or as a whole.

Two formats: that of Hermes and Qwen, an object ``{"name": ..., "arguments": {...}}`` between ``<tool_call>`` and
``</tool_call>``, any number of them, with text around; and that of Llama 3, where the whole answer is
``{"name": ..., "parameters": {...}}``, or several of them with ``;`` between.

The arguments are the text that the model wrote: nothing is completed or repaired, and those of an answer that was cut
are cut. What is not a call is text. White space beside a call is left out. The calls and the text do not depend on the
pieces in which an answer comes (tests/trusted/text/test_tool_calls.py).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tsqp.trusted.text.stop_strings import beginning_of

ToolFormat = Literal["hermes", "llama3"]

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"  # may stand before a call of Llama 3; no text where it is a control token
_ARGUMENTS = ("arguments", "parameters")
_KEYS = ("name", "type", "id", *_ARGUMENTS)  # an object with another key before it is known to be a call is none
_XML = ("<function=", "<arg_key>")  # within the tags, in the calls of Qwen3-Coder and of GLM
_SPACE = " \t\r\n"  # as JSON has it


@dataclass(frozen=True)
class Text:
    """A piece of the answer that is no call."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call begins: its place among the calls of this answer, and the name of its function."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next piece of the arguments of a call, JSON as the model wrote it."""

    index: int
    text: str


Event = Text | CallStart | CallArguments


@dataclass(frozen=True)
class ToolCall:
    """A call of a function. ``arguments``: JSON as the model wrote it; ``complete``: all of it, not cut."""

    name: str
    arguments: str
    complete: bool = True


class ToolCallParser(ABC):
    """Finds the calls of one answer."""

    def __init__(self) -> None:
        self._rest = ""  # what has come and is not taken
        self._calls = 0  # those that were found and have ended
        self._call: _Call | None = None  # that is being read

    @property
    def calls(self) -> int:
        """How many calls have ended so far, each with its object."""
        return self._calls

    def push(self, text: str) -> list[Event]:
        """What became certain with the next piece of the answer."""
        self._rest += text
        events: list[Event] = []
        while self._step(events):
            pass
        return events

    @abstractmethod
    def finish(self) -> list[Event]:
        """The rest, at the end of the answer. A call under way stays as it is."""

    @abstractmethod
    def _step(self, events: list[Event]) -> bool:
        """Take one part of what has come; False where more text has to come first."""


class HermesParser(ToolCallParser):
    """Calls between ``<tool_call>`` and ``</tool_call>``."""

    def __init__(self) -> None:
        super().__init__()
        self._closing = False  # a call's object has ended, its closing tag has not come
        self._skips_space = False

    def finish(self) -> list[Event]:
        events: list[Event] = []
        if self._call is not None:
            events += _as_text(_OPEN + self._call.text if not self._call.started else "")
        elif not (self._closing and _CLOSE.startswith(self._rest.lstrip(_SPACE))):
            events += _as_text(self._rest)
        self._rest, self._call, self._closing = "", None, False
        return events

    def _step(self, events: list[Event]) -> bool:
        if self._call is not None:
            return self._read_call(self._call, events)
        if self._closing or self._skips_space:
            self._rest = self._rest.lstrip(_SPACE)
        if self._closing:
            if self._rest.startswith(_CLOSE):
                self._rest = self._rest[len(_CLOSE) :]
            elif _CLOSE.startswith(self._rest):
                return False
            self._closing, self._skips_space = False, True
            return True
        return self._read_text(events)

    def _read_text(self, events: list[Event]) -> bool:
        at = self._rest.find(_OPEN)
        before = self._rest[: at if at >= 0 else beginning_of(self._rest, _OPEN)].rstrip(_SPACE)
        events += _as_text(before)
        self._skips_space = self._skips_space and not before
        if at < 0:
            self._rest = self._rest[len(before) :]  # it may be the beginning of a tag, or the space before one
            return False
        self._rest = self._rest[at + len(_OPEN) :]
        self._call = _Call(self._calls)
        return True

    def _read_call(self, call: _Call, events: list[Event]) -> bool:
        self._rest = call.read(self._rest, events)
        if not call.ended:
            return False
        self._call = None
        if call.started:
            self._calls += 1
            self._closing = True
        else:
            self._skips_space = False
            events += _as_text(_OPEN + call.text)
        return True


class Llama3Parser(ToolCallParser):
    """An answer that is nothing but calls."""

    def __init__(self) -> None:
        super().__init__()
        self._is_text = False
        self._before = ""  # what stands between calls, and is text if none follows

    def finish(self) -> list[Event]:
        events: list[Event] = []
        if self._call is not None and not self._call.started:
            events += _as_text(self._before + self._call.text)
        elif self._call is None and not self._calls:
            events += _as_text(self._before + self._rest)
        self._rest, self._before, self._call = "", "", None
        return events

    def _step(self, events: list[Event]) -> bool:
        if self._is_text:
            events += _as_text(self._rest)
            self._rest = ""
            return False
        if self._call is not None:
            return self._read_call(self._call, events)
        start = self._rest.lstrip(_SPACE)
        lead = _PYTHON_TAG if not self._calls else ";"
        if not self._before and start.startswith(lead):
            self._before, self._rest = self._rest[: len(self._rest) - len(start)] + lead, start[len(lead) :]
            return True
        if start.startswith("{") and (self._before or not self._calls):
            self._before += self._rest[: len(self._rest) - len(start)]
            self._rest = start
            self._call = _Call(self._calls)
            return True
        if not start or (not self._before and lead.startswith(start)):
            return False
        self._give_up(self._rest.lstrip(_SPACE) if self._calls and not self._before else self._rest)
        return True

    def _read_call(self, call: _Call, events: list[Event]) -> bool:
        self._rest = call.read(self._rest, events)
        if not call.ended:
            return False
        self._call = None
        if call.started:
            self._calls += 1
            self._before = ""
        else:
            self._give_up(call.text + self._rest)
        return True

    def _give_up(self, text: str) -> None:
        """From here on the answer is text."""
        self._is_text = True
        self._rest, self._before = self._before + text, ""


class _Call:
    """Reads one object, character by character.

    ``text``: what it has read. ``started``: it is a call, its name and the beginning of its arguments are known.
    ``ended``: with its last brace, or where it turned out to be none.
    """

    def __init__(self, index: int) -> None:
        self.text = ""
        self.started = False
        self.ended = False
        self._index = index
        self._depth = 0
        self._string_from: int | None = None  # where the string that is being read begins
        self._escaped = False
        self._key: str | None = None
        self._expects = "{"  # the kind of thing that may come at depth 0 and 1: { key : value ,
        self._name: str | None = None
        self._arguments_from: int | None = None
        self._arguments_to: int | None = None
        self._given = 0  # characters of the arguments that were handed out

    def read(self, text: str, events: list[Event]) -> str:
        """Take what belongs to the object; returns what does not."""
        taken = 0
        for character in text:
            if self.ended or not self._takes(character):
                self.ended = True
                break
            self.text += character
            taken += 1
            self._after(character)
        self._tell(events)
        return text[taken:]

    def _takes(self, character: str) -> bool:
        """Whether a character can come next. Within a value all can: a value is not looked at."""
        if self._string_from is not None or self._depth > 1 or character in _SPACE:
            return True
        match self._expects:
            case "{" | ":":
                return character == self._expects
            case "key":
                return character in ('"}' if self._key is None or self._is_call else '"')
            case "value":
                if self._key in _ARGUMENTS:
                    return character == "{"
                if self._key == "name":
                    return character == '"'
                return character in '"[{-' or character.isalnum()
            case _:  # after a value, or within a number or a word
                return character in ",}+-." or character.isalnum()

    def _after(self, character: str) -> None:
        at = len(self.text) - 1
        if self._string_from is not None:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                start, self._string_from = self._string_from, None
                if self._depth == 1:
                    self._take_string(self.text[start : at + 1])
        elif character == '"':
            self._string_from = at
        elif character in "{[":
            if self._depth == 1 and self._key in _ARGUMENTS and self._arguments_from is None:
                self._arguments_from = at
            self._depth += 1
            self._expects = "key" if self._depth == 1 else ","
        elif character in "}]":
            self._depth -= 1
            if self._depth == 1 and self._arguments_from is not None and self._arguments_to is None:
                self._arguments_to = at + 1
            self.ended = self._depth == 0
        elif self._depth == 1 and character not in _SPACE:
            self._expects = {",": "key", ":": "value"}.get(character, ",")

    def _take_string(self, written: str) -> None:
        """A key, or a value, of the object itself. What comes beside those of a call plays no part."""
        if self._is_call:
            self._key, self._expects = None, ":" if self._expects == "key" else ","
            return
        try:
            value = json.loads(written)
        except ValueError:
            self.ended = True
            return
        if self._expects == "key":
            self._key, self._expects = value, ":"
            self.ended = value not in _KEYS
        else:
            if self._key == "name" and self._name is None:
                self._name = value
            self._expects = ","

    @property
    def _is_call(self) -> bool:
        return self._name is not None and self._arguments_from is not None

    def _tell(self, events: list[Event]) -> None:
        """Hand out the name once it is known with the beginning of the arguments, then the arguments as they come."""
        if self._name is None or self._arguments_from is None:
            return
        if not self.started:
            self.started, self._given = True, self._arguments_from
            events.append(CallStart(self._index, self._name))
        end = len(self.text) if self._arguments_to is None else self._arguments_to
        if end > self._given:
            events.append(CallArguments(self._index, self.text[self._given : end]))
            self._given = end


PARSERS: Mapping[ToolFormat, type[ToolCallParser]] = {"hermes": HermesParser, "llama3": Llama3Parser}


def tool_format(template: str) -> ToolFormat | None:
    """The format that a chat template asks the model for; None for one that is not known."""
    if _OPEN in template:
        return None if any(tag in template for tag in _XML) else "hermes"
    return "llama3" if '{"name": function name, "parameters"' in template else None


def collect(events: Iterable[Event]) -> tuple[str, list[ToolCall]]:
    """The text and the calls of a whole answer."""
    text, names, arguments = "", list[str](), list[str]()
    for event in events:
        match event:
            case Text():
                text += event.text
            case CallStart():
                names.append(event.name)
                arguments.append("")
            case CallArguments():
                arguments[event.index] += event.text
    calls = [ToolCall(name, given, _is_json(given)) for name, given in zip(names, arguments, strict=True)]
    return text, calls


def parse(answer: str, format: ToolFormat) -> tuple[str, list[ToolCall]]:
    """The text and the calls of an answer that is there as a whole."""
    parser = PARSERS[format]()
    return collect([*parser.push(answer), *parser.finish()])


def with_parsed_arguments(messages: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Messages of OpenAI's API for a chat template: arguments of calls as mappings, where the API has their JSON.

    Arguments that are no JSON object stay text.
    """
    return [_with_parsed_arguments(message) for message in messages]


def _with_parsed_arguments(message: Mapping[str, object]) -> dict[str, object]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return dict(message)
    return {**message, "tool_calls": [_parsed_call(call) for call in calls]}


def _parsed_call(call: object) -> object:
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        return call
    function = dict(call["function"])
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        function["arguments"] = parsed if isinstance(parsed, dict) else arguments
    return {**call, "function": function}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _as_text(text: str) -> list[Event]:
    return [Text(text)] if text else []
