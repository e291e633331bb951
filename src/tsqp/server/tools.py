"""Tools of a request: what the template is told of them, and what form an answer must have that has to be a call."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from tsqp.server.errors import ApiError
from tsqp.server.service import Service
from tsqp.trusted.engine.structured_outputs import StructuredOutputsParams
from tsqp.trusted.text.tool_calls import PARSERS, CallArguments, CallStart, Event, Text, ToolFormat

if TYPE_CHECKING:
    from tsqp.api.answer import Delta

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Function(msgspec.Struct, kw_only=True, frozen=True):
    """``parameters``: a JSON schema of an object; None: no parameters. ``strict`` holds wherever a call is required."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


@dataclass(frozen=True)
class Choice:
    """``mode``: ``none``, ``auto``, ``required`` or ``named``, then with the ``name`` of the one function."""

    mode: str
    name: str = ""


@dataclass(frozen=True)
class ToolUse:
    """``definitions``: for the template. ``form``: of an answer that has to be a call, else None.

    ``single``: what comes after the first call is no part of the answer. ``named``: one function was asked for.
    """

    definitions: list[dict[str, Any]]
    format: ToolFormat
    form: StructuredOutputsParams | None
    single: bool
    named: bool


def tool_choice(choice: object, has_tools: bool) -> Choice:
    """From the field of a request, in the shape of chat or of responses. Raises ApiError."""
    if choice is None:
        return Choice("auto" if has_tools else "none")
    match choice:
        case "none":
            return Choice("none")
        case "auto" | "required" if has_tools:
            return Choice(str(choice))
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            if has_tools:
                return Choice("named", name)
        case "auto":
            return Choice("none")
    raise _wrong("tool_choice", "none, auto, required or one function, and the last two need tools")


def tool_use(
    service: Service, functions: Sequence[Function] | None, choice: object, parallel: bool | None
) -> ToolUse | None:
    """None where no call may come. Raises ApiError, and OptionError where the model's template reads no tools."""
    if functions is not None and not 1 <= len(functions) <= MAX_TOOLS:
        raise _wrong("tools", f"a list of 1 to {MAX_TOOLS} functions")
    chosen = tool_choice(choice, functions is not None)
    if functions is None or chosen.mode == "none":
        return None
    _check(functions)
    format_ = service.tool_format
    allowed = [one for one in functions if chosen.mode != "named" or one.name == chosen.name]
    if not allowed:
        raise _wrong("tool_choice", "one of the functions in tools")
    named = chosen.mode == "named"
    single = named or parallel is False
    form = None if chosen.mode == "auto" else _form(allowed, format_, single)
    return ToolUse([_definition(one) for one in functions], format_, form, single, named)


class CallReader:
    """Text and calls of one answer, piece by piece; all of it is text where no call may come."""

    def __init__(self, tools: ToolUse | None) -> None:
        self._parser = None if tools is None else PARSERS[tools.format]()
        self._single = tools is not None and tools.single
        self._named = tools is not None and tools.named
        self._called = False

    def push(self, delta: Delta) -> list[Event]:
        """What became certain."""
        if self._parser is None:
            return [Text(delta.text)] if delta.text else []
        events = self._parser.push(delta.text)
        if delta.completion is not None:
            events += self._parser.finish()
        return [event for event in events if self._keeps(event)]

    def finish_reason(self, reason: str) -> str:
        """As the API has it: ``tool_calls``, unless the answer was cut or its one function was asked for."""
        return "tool_calls" if self._called and reason == "stop" and not self._named else reason

    def _keeps(self, event: Event) -> bool:
        if self._single and self._called:
            return isinstance(event, CallArguments) and event.index == 0
        self._called = self._called or isinstance(event, CallStart)
        return True


def _definition(function: Function) -> dict[str, Any]:
    told: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        told["description"] = function.description
    if function.parameters is not None:
        told["parameters"] = function.parameters
    return {"type": "function", "function": told}


def _check(functions: Sequence[Function]) -> None:
    names = [one.name for one in functions]
    if len(set(names)) < len(names) or not all(map(_NAME.fullmatch, names)):
        raise _wrong("tools", "functions with different names of 1 to 64 letters, digits, _ and -")
    if any((one.parameters or {}).get("type", "object") != "object" for one in functions):
        raise _wrong("tools", "functions whose parameters are an object")


def _form(functions: Sequence[Function], format_: ToolFormat, single: bool) -> StructuredOutputsParams:
    """One call of one of these, or several; a schema of its own for each, so that its references stay within."""
    key = "arguments" if format_ == "hermes" else "parameters"
    before, after, between = ("<tool_call>\n", "\n</tool_call>", "\n") if format_ == "hermes" else ("", "", "; ")
    lines = [f"start: call{'' if single else f' ({_literal(between)} call)*'}"]
    lines.append("call: " + " | ".join(f"call{index}" for index in range(len(functions))))
    for index, one in enumerate(functions):
        schema = {
            "type": "object",
            **(one.parameters or {"properties": {}, "additionalProperties": False}),
            "x-guidance": {"whitespace_flexible": False},
        }
        begin = f'{before}{{"name": {json.dumps(one.name)}, "{key}": '
        end = f"}}{after}"
        lines.append(f"call{index}: {_literal(begin)} arguments{index} {_literal(end)}")
        lines.append(f"arguments{index}: %json {json.dumps(schema)}")
    return StructuredOutputsParams(grammar="\n".join(lines))


def _literal(text: str) -> str:
    return json.dumps(text)


def _wrong(param: str, what: str) -> ApiError:
    return ApiError(400, f"{param} must be {what}", param=param, code="invalid_value")
