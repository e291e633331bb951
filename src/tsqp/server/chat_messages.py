"""Messages of a client as the conversation that a chat template sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from tsqp.server.errors import ApiError
from tsqp.trusted.text.tool_calls import with_parsed_arguments

Role = Literal["system", "developer", "user", "assistant", "tool"]


class Part(msgspec.Struct, kw_only=True, frozen=True):
    """A part of a content; all but text is refused. Parts of an answer that is sent back have the last two as well."""

    type: str
    text: str | None = None
    annotations: Any = None
    logprobs: Any = None


class CalledFunction(msgspec.Struct, kw_only=True, frozen=True):
    """``arguments``: JSON, as a text."""

    name: str
    arguments: str


class Call(msgspec.Struct, kw_only=True, frozen=True):
    """A call that an answer had."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class Message(msgspec.Struct, kw_only=True, frozen=True):
    """One turn."""

    role: Role
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


def conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """What a template sees. Raises ApiError that names the message.

    A developer is a system: templates know that role. Several of them at the beginning become one, as most templates
    take no second one.
    """
    if not messages:
        raise ApiError(400, "messages must have at least one message", param="messages", code="invalid_value")
    turns = [_turn(message, f"messages[{index}]") for index, message in enumerate(messages)]
    first = next((index for index, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
    if first > 1:
        turns[:first] = [{"role": "system", "content": "\n\n".join(turn["content"] for turn in turns[:first])}]
    return with_parsed_arguments(turns)


def text_of(content: str | Sequence[Part] | None, place: str, kinds: Sequence[str] = ("text",)) -> str:
    """The text of a content. Raises ApiError for a part that is none."""
    if content is None or isinstance(content, str):
        return content or ""
    for index, part in enumerate(content):
        if part.type not in kinds or part.text is None:
            param = f"{place}[{index}]"
            raise ApiError(400, f"{param} must be a text: this model reads no other", param=param, code="invalid_value")
    return "\n".join(part.text or "" for part in content)


def _turn(message: Message, place: str) -> dict[str, Any]:
    if message.content is None and message.role != "assistant":
        raise ApiError(400, f"{place}.content is missing", param=f"{place}.content", code="missing_required_parameter")
    if message.tool_calls and message.role != "assistant":
        raise ApiError(
            400, f"{place}.tool_calls is for the assistant", param=f"{place}.tool_calls", code="invalid_value"
        )
    turn: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": text_of(message.content, f"{place}.content"),
    }
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            turn[name] = getattr(message, name)
    if message.tool_calls:
        turn["tool_calls"] = msgspec.to_builtins(message.tool_calls)
    return turn
