"""Tools of a request: what the template is told of them, and what form an answer must have that has to be a call."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from tsqp.errors import OptionError
from tsqp.server.closed_schema import closed
from tsqp.server.errors import ApiError
from tsqp.server.service import Service
from tsqp.trusted.engine.structured_outputs import StructuredOutputsParams
from tsqp.trusted.text.tool_calls import PARSERS, CallArguments, CallStart, Event, Text, ToolFormat

if TYPE_CHECKING:
    from tsqp.api.answer import Delta, Ends

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
    """``mode``: ``none``, ``auto`` or ``required``. ``names``: of the functions that may be called; None for all.

    ``named``: a call of one function was asked for by its name.
    """

    mode: str
    names: frozenset[str] | None = None
    named: bool = False


@dataclass(frozen=True)
class ToolUse:
    """``definitions``: for the template. ``form``: of an answer that has to be a call, or has to be one or JSON.

    ``single``: the answer ends with the first call. ``named``: one function was asked for.
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
                return Choice("required", frozenset([name]), named=True)
        case {"type": "allowed_tools", "allowed_tools": dict(allowed)} | {"type": "allowed_tools", **allowed}:
            mode, tools = allowed.get("mode"), allowed.get("tools")
            if has_tools and mode in ("auto", "required") and isinstance(tools, list):
                return Choice(mode, frozenset(map(_allowed, tools)))
        case "auto":
            return Choice("none")
    raise _wrong("tool_choice", "none, auto, required, one function or allowed_tools; all but none and auto need tools")


def tool_use(
    service: Service,
    functions: Sequence[Function] | None,
    choice: object,
    parallel: bool | None,
    form: StructuredOutputsParams | None = None,
) -> ToolUse | None:
    """None where no call may come. Raises ApiError, and OptionError where the model's template reads no tools.

    ``form``: of an answer that is no call.
    """
    if functions is not None and not 1 <= len(functions) <= MAX_TOOLS:
        raise _wrong("tools", f"a list of 1 to {MAX_TOOLS} functions")
    chosen = tool_choice(choice, functions is not None)
    if functions is None or chosen.mode == "none":
        return None
    _check(functions)
    format_ = service.tool_format
    names = {one.name for one in functions} if chosen.names is None else chosen.names
    allowed = [one for one in functions if one.name in names]
    if not allowed or len(allowed) < len(names):
        raise _wrong("tool_choice", "of the functions in tools")
    single = chosen.named or parallel is False
    if chosen.mode == "required":
        form = _form(allowed, format_, single)
    elif form is not None:
        form = _form(allowed, format_, single, form)
    told = functions if chosen.named else allowed  # what it is not told of, a model that may call does not call
    return ToolUse([_definition(one) for one in told], format_, form, single, chosen.named)


def end_of_call(tools: ToolUse | None) -> Ends | None:
    """For one answer: ends it where the object of its only call has closed. None where it may go on after that."""
    if tools is None or not tools.single:
        return None
    parser = PARSERS[tools.format]()

    def ends(piece: str) -> bool:
        parser.push(piece)
        return parser.calls > 0

    return ends


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


def _allowed(tool: object) -> str:
    """The name of a function in a list of those that may be called."""
    match tool:
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            return name
    raise _wrong("tool_choice", "of functions with names")


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


def _form(
    functions: Sequence[Function], format_: ToolFormat, single: bool, answer: StructuredOutputsParams | None = None
) -> StructuredOutputsParams:
    """One call of one of these, or several; a schema of its own for each, so that its references stay within.

    ``answer``: JSON that may come instead.
    """
    key = "arguments" if format_ == "hermes" else "parameters"
    before, after, between = ("<tool_call>\n", "\n</tool_call>", "\n") if format_ == "hermes" else ("", "", "; ")
    lines = ["start: calls" if answer is None else "start: calls | answer"]
    if answer is not None:
        schema = json.loads(answer.json) if isinstance(answer.json, str) else {"type": "object"}
        lines.append(f"answer: {_json(schema)}")
    lines.append(f"calls: call{'' if single else f' ({_literal(between)} call)*'}")
    lines.append("call: " + " | ".join(f"call{index}" for index in range(len(functions))))
    for index, one in enumerate(functions):
        schema = closed({"type": "object", **(one.parameters or {"properties": {}})})
        if answer is not None and format_ == "llama3":
            lines.append(f"call{index}: {_json(_whole_call(one.name, schema))}")
            continue
        begin = f'{before}{{"name": {json.dumps(one.name)}, "{key}": '
        end = f"}}{after}"
        lines.append(f"call{index}: {_literal(begin)} arguments{index} {_literal(end)}")
        lines.append(f"arguments{index}: {_json(schema)}")
    return StructuredOutputsParams(grammar="\n".join(lines))


def _whole_call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The schema of a call of Llama 3. Beside JSON it has to be JSON: literals would hide the other from the lexer.

    What the arguments refer to as ``#/$defs/...`` lies at the root then.
    """
    definitions: dict[str, Any] = {key: arguments.pop(key) for key in ("$defs", "definitions") if key in arguments}
    properties = {"name": {"const": name}, "parameters": arguments}
    return {
        **definitions,
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _json(schema: dict[str, Any]) -> str:
    """Raises OptionError."""
    with suppress(RecursionError):
        return f"%json {json.dumps({**schema, 'x-guidance': {'whitespace_flexible': False}})}"
    field = "structured_outputs.grammar"
    raise OptionError(f"{field} cannot be used: it is nested too deeply", fields=(field,))


def _literal(text: str) -> str:
    return json.dumps(text)


def _wrong(param: str, what: str) -> ApiError:
    return ApiError(400, f"{param} must be {what}", param=param, code="invalid_value")
