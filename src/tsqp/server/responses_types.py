"""The responses API: what a client sends, and what it gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, UnsetType

from tsqp.server.chat_messages import Part
from tsqp.server.errors import ErrorBody
from tsqp.server.logprobs import TopLogprobs
from tsqp.server.params import SamplingBody, TokenCount, TopCount
from tsqp.server.ranges import documented
from tsqp.tee.receipts import SignedReceipt


class TextFormat(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """``schema`` is for ``json_schema``."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """The form of the text of an answer."""

    format: TextFormat | None = None


class FunctionTool(msgspec.Struct, kw_only=True, frozen=True):
    """A function; there are no tools of another type here."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class InputItem(msgspec.Struct, kw_only=True, frozen=True, tag_field="type"):
    """An item says of which type it is. What else one of an answer has, which is sent back, plays no part."""

    id: str | None = None
    status: str | None = None


class InputMessage(InputItem, kw_only=True, frozen=True, tag="message"):
    """A turn, also one of an answer that was given before."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]


class InputCall(InputItem, kw_only=True, frozen=True, tag="function_call"):
    """A call that an answer had."""

    call_id: str
    name: str
    arguments: str


class InputCallOutput(InputItem, kw_only=True, frozen=True, tag="function_call_output"):
    """What came of a call."""

    call_id: str
    output: str | list[Part]


class ResponsesBody(SamplingBody, kw_only=True, frozen=True):
    """Nothing is stored, so nothing that was stored can be asked for."""

    refused: ClassVar = {
        "background": (False,),
        "conversation": (),
        "max_tool_calls": (),
        "previous_response_id": (),
        "prompt": (),
        "reasoning": ({}, {"effort": None}, {"effort": None, "summary": None}),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "truncation": ("disabled",),
    }

    input: str | Annotated[list[InputMessage | InputCall | InputCallOutput], documented(minItems=1)]
    instructions: str | None = None
    max_output_tokens: TokenCount | None = None
    text: TextConfig | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include: list[str] | None = None
    top_logprobs: TopCount | None = None
    metadata: dict[str, str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @classmethod
    def completed(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """An item of the input that does not say its type is a message."""
        items = values.get("input")
        if not isinstance(items, list):
            return values
        return {**values, "input": [_with_type(item) for item in items]}


def _with_type(item: object) -> object:
    return {**item, "type": "message"} if isinstance(item, dict) and item.get("type") is None else item


class OutputText(msgspec.Struct, frozen=True):
    """The one part that a message has."""

    text: str
    logprobs: list[TopLogprobs]
    annotations: list[str] = []
    type: str = "output_text"


class OutputMessage(msgspec.Struct, frozen=True, tag_field="type", tag="message"):
    """Text of an answer."""

    id: str
    status: str
    content: list[OutputText]
    role: str = "assistant"


class OutputCall(msgspec.Struct, frozen=True, tag_field="type", tag="function_call"):
    """A call of a function."""

    id: str
    status: str
    call_id: str
    name: str
    arguments: str


Item = OutputMessage | OutputCall


class InputDetails(msgspec.Struct, frozen=True):
    """What is found in kept caches is not told."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct, frozen=True):
    """No model here thinks apart from its answer."""

    reasoning_tokens: int = 0


class ResponsesUsage(msgspec.Struct, frozen=True):
    """How many tokens the request took."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails = InputDetails()
    output_tokens_details: OutputDetails = OutputDetails()


class Incomplete(msgspec.Struct, frozen=True):
    """Why an answer ended early."""

    reason: str = "max_output_tokens"


class Response(msgspec.Struct, kw_only=True, frozen=True):
    """The answer, and what was asked for."""

    id: str
    object: str = "response"
    created_at: int
    status: str
    model: str
    system_fingerprint: str
    output: list[Item]
    usage: ResponsesUsage | None = None
    incomplete_details: Incomplete | None = None
    error: None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    temperature: float
    text: TextConfig
    tool_choice: str | dict[str, Any]
    tools: list[FunctionTool]
    top_logprobs: int
    top_p: float
    background: bool = False
    previous_response_id: None = None
    store: bool = False
    truncation: str = "disabled"


class ResponseEvent(msgspec.Struct, kw_only=True, frozen=True):
    """An event; which fields it has depends on its type. ``receipt``: in the last, where it was asked for."""

    type: str
    sequence_number: int
    response: Response | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    item: Item | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    part: OutputText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    logprobs: list[TopLogprobs] | UnsetType = UNSET
    message: str | UnsetType = UNSET
    code: str | UnsetType | None = UNSET
    param: str | UnsetType | None = UNSET
    error: ErrorBody | UnsetType = UNSET
    receipt: SignedReceipt | UnsetType = UNSET
