"""The chat API: what a client sends, and what it gets."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType

from tsqp.server.chat_messages import Message
from tsqp.server.logprobs import TopLogprobs
from tsqp.server.params import ChoicesBody, TokenCount, TopCount
from tsqp.server.ranges import documented
from tsqp.server.response_format import ResponseFormat
from tsqp.server.tools import MAX_TOOLS, Function
from tsqp.server.usage import Usage
from tsqp.tee.receipts import SignedReceipt


class Tool(msgspec.Struct, kw_only=True, frozen=True):
    """A function; there are no tools of another type here."""

    type: str
    function: Function


class ChatBody(ChoicesBody, kw_only=True, frozen=True):
    """What is beyond ``parallel_tool_calls`` is not OpenAI's."""

    refused: ClassVar = {
        "audio": (),
        "function_call": ("none",),
        "functions": (),
        "modalities": (["text"],),
        "prediction": (),
        "reasoning_effort": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "verbosity": (),
        "web_search_options": (),
    }

    messages: Annotated[list[Message], documented(minItems=1)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: TopCount | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], documented(minItems=1, maxItems=MAX_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class FunctionCall(msgspec.Struct, frozen=True):
    """``name`` comes once, before the arguments."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCall(msgspec.Struct, frozen=True):
    """A call, or the next piece of one, which has its ``index`` among the calls."""

    function: FunctionCall
    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class Answer(msgspec.Struct, frozen=True):
    """The message of an answer."""

    content: str | None
    tool_calls: list[ToolCall] | UnsetType = UNSET
    role: str = "assistant"
    refusal: str | None = None


class Logprobs(msgspec.Struct, frozen=True):
    """An entry for each token."""

    content: list[TopLogprobs]
    refusal: None = None


class Choice(msgspec.Struct, frozen=True):
    """One of the answers."""

    index: int
    message: Answer
    finish_reason: str
    logprobs: Logprobs | None = None


class Completion(msgspec.Struct, frozen=True):
    """The whole answer."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage
    object: str = "chat.completion"


class Piece(msgspec.Struct, frozen=True):
    """What is new of a message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChoicePiece(msgspec.Struct, frozen=True):
    """What is new of one of the answers."""

    index: int
    delta: Piece
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class Chunk(msgspec.Struct, frozen=True):
    """An event. ``usage``: null in each but one, where it was asked for; ``receipt``: in the last, likewise."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChoicePiece]
    usage: Usage | UnsetType | None = UNSET
    receipt: SignedReceipt | UnsetType = UNSET
    object: str = "chat.completion.chunk"
