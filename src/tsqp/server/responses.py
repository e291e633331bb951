"""POST /v1/responses: one answer to a conversation that the client sends whole. Nothing is stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tsqp.server.answers import Answers, Asked, unless_left
from tsqp.server.body import read_body
from tsqp.server.chat import encoded
from tsqp.server.chat_messages import Call, CalledFunction, Message, text_of
from tsqp.server.errors import ApiError
from tsqp.server.json_reply import json_reply
from tsqp.server.params import answer_tokens, check_stream_options, check_top_logprobs, salt_of, sampling_params
from tsqp.server.receipts import draft_of, repeatable, with_header, with_receipt
from tsqp.server.response_format import form_errors, form_of
from tsqp.server.responses_reply import Reply
from tsqp.server.responses_types import InputCall, InputCallOutput, InputMessage, ResponsesBody
from tsqp.server.service import Service
from tsqp.server.streams import EventStream, padding_of
from tsqp.server.tools import Function, ToolUse, end_of_call, tool_use
from tsqp.trusted.engine.structured_outputs import StructuredOutputsParams

LOGPROBS = "message.output_text.logprobs"  # the one thing that may be included
_TEXTS = ("input_text", "output_text", "text")


async def create(service: Service, request: Request) -> Response:
    """The endpoint."""
    body = await read_body(service, request, ResponsesBody)
    return await unless_left(request, _answered(service, request, body))


async def _answered(service: Service, request: Request, body: ResponsesBody) -> Response:
    lora = service.adapter_of(body.model)
    check_stream_options(body)
    with form_errors("text.format"):
        form = _form(body)
    with form_errors("text.format", both=form is not None):
        tools = _tools(service, body, form)
    params = repeatable(
        service, sampling_params(body, logprobs=_logprobs(body), form=form if tools is None else tools.form)
    )
    prompt = await encoded(service, messages_of(body), tools, body.chat_template_kwargs, param="input")
    default, param = service.settings.max_answer_tokens, "max_output_tokens"
    most = answer_tokens(service, len(prompt), body.max_output_tokens, default, param=param, prompt="input")
    reply = Reply(service, body, tools, len(prompt))
    asked = [Asked(prompt, replace(params, max_tokens=most), lora=lora, ends=end_of_call(tools))]
    draft = await draft_of(service, request, "/v1/responses", body, asked)
    with form_errors("text.format", both=form is not None and tools is not None):
        answers = await Answers.open(service, request, "responses", asked, salt_of(body))
    if body.stream:
        events = with_receipt(reply.events(answers), draft, answers)
        return EventStream(service, answers, events, padding=padding_of(service, body), end=b"")
    async with answers:
        return with_header(json_reply(await reply.whole(answers)), draft, answers)


def messages_of(body: ResponsesBody) -> list[Message]:
    """The conversation: instructions, then the items of the input. Raises ApiError that names the item."""
    messages = [] if body.instructions is None else [Message(role="system", content=body.instructions)]
    if isinstance(body.input, str):
        return [*messages, Message(role="user", content=body.input)]
    if not body.input:
        raise ApiError(400, "input must have at least one item", param="input", code="invalid_value")
    for index, item in enumerate(body.input):
        _add(messages, item, f"input[{index}]")
    return messages


def _add(messages: list[Message], item: InputMessage | InputCall | InputCallOutput, place: str) -> None:
    """One more turn. Calls are part of the assistant's turn before them."""
    match item:
        case InputMessage():
            content = text_of(item.content, f"{place}.content", _TEXTS)
            messages.append(Message(role=item.role, content=content))
        case InputCall():
            made = Call(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
            if not messages or messages[-1].role != "assistant":
                messages.append(Message(role="assistant"))
            calls = messages[-1].tool_calls
            if calls is None:
                messages[-1] = msgspec.structs.replace(messages[-1], tool_calls=[made])
            else:
                calls.append(made)
        case InputCallOutput():
            text = text_of(item.output, f"{place}.output", _TEXTS)
            messages.append(Message(role="tool", content=text, tool_call_id=item.call_id))


def _tools(service: Service, body: ResponsesBody, form: StructuredOutputsParams | None) -> ToolUse | None:
    functions: Sequence[Function] | None = None
    if body.tools:
        functions = [
            Function(name=tool.name or "", description=tool.description, parameters=tool.parameters)
            for tool in body.tools
        ]
        if any(tool.type != "function" for tool in body.tools):
            raise ApiError(400, "tools must be functions", param="tools", code="invalid_value")
    return tool_use(service, functions, body.tool_choice, body.parallel_tool_calls, form)


def _form(body: ResponsesBody) -> StructuredOutputsParams | None:
    format_ = None if body.text is None else body.text.format
    return None if format_ is None else form_of(format_.type, format_.schema, "text.format.schema")


def _logprobs(body: ResponsesBody) -> int | None:
    top = body.top_logprobs
    check_top_logprobs(top)
    if any(one != LOGPROBS for one in body.include or ()):
        raise ApiError(400, f"include may have {LOGPROBS} alone", param="include", code="unsupported_parameter")
    return top or 0 if body.include else None
