"""POST /v1/chat/completions: a conversation, answered whole or as a stream of chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from tsqp.api.text_threads import on_text_thread
from tsqp.server.answers import Answers, Asked, unless_left
from tsqp.server.body import read_body
from tsqp.server.chat_messages import Message, conversation
from tsqp.server.chat_reply import Reply
from tsqp.server.chat_types import ChatBody
from tsqp.server.errors import ApiError
from tsqp.server.json_reply import json_reply
from tsqp.server.params import (
    answer_tokens,
    check_choices,
    check_stream_options,
    check_top_logprobs,
    of_choice,
    refuse_too_long,
    salt_of,
    sampling_params,
)
from tsqp.server.receipts import draft_of, repeatable, with_header, with_receipt
from tsqp.server.response_format import form_errors, form_of
from tsqp.server.service import Service
from tsqp.server.streams import EventStream, padding_of
from tsqp.server.tools import ToolUse, end_of_call, tool_use
from tsqp.trusted.engine.sampling_params import SamplingParams
from tsqp.trusted.engine.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from tsqp.trusted.tap import Tap


async def create(service: Service, request: Request) -> Response:
    """The endpoint."""
    body = await read_body(service, request, ChatBody)
    return await unless_left(request, _answered(service, request, body))


@dataclass(frozen=True)
class Prepared:
    """What is to be asked, once all of a body was found to be right.

    ``tools``: what the template is told of. ``either``: the answer has a form, or is a call. ``lora``: the adapter.
    """

    prompt: list[int]
    params: SamplingParams
    tools: ToolUse | None
    either: bool
    reply: Reply
    lora: str | None

    def choice(self, index: int, tap: Tap | None = None) -> Asked:
        """One of the answers. ``tap``: see ``Asked``."""
        return Asked(self.prompt, of_choice(self.params, index), tap, self.lora, end_of_call(self.tools))


async def prepared(service: Service, body: ChatBody) -> Prepared:
    """Check a body and encode its conversation. Raises ApiError, OptionError and PromptError."""
    lora = service.adapter_of(body.model)
    check_choices(service, body.choices)
    check_stream_options(body)
    with form_errors("response_format"):
        form = _form(body)
    with form_errors("response_format", both=form is not None):
        tools = _tools(service, body, form)
    params = repeatable(
        service, sampling_params(body, logprobs=_logprobs(body), form=form if tools is None else tools.form)
    )
    prompt = await encoded(service, body.messages, tools, body.chat_template_kwargs)
    asked, param = body.max_completion_tokens, "max_completion_tokens"
    if asked is None:
        asked, param = body.max_tokens, "max_tokens"
    default = service.settings.max_answer_tokens
    most = answer_tokens(service, len(prompt), asked, default, param=param, prompt="messages", choices=body.choices)
    either, reply = form is not None and tools is not None, Reply(service, body, tools, len(prompt))
    return Prepared(prompt, replace(params, max_tokens=most), tools, either, reply, lora)


async def _answered(service: Service, request: Request, body: ChatBody) -> Response:
    asked = await prepared(service, body)
    every = [asked.choice(index) for index in range(body.choices)]
    draft = await draft_of(service, request, "/v1/chat/completions", body, every, body.choices)
    with form_errors("response_format", both=asked.either):
        answers = await Answers.open(service, request, "chat", every, salt_of(body))
    if body.stream:
        events = with_receipt(asked.reply.events(answers), draft, answers)
        return EventStream(service, answers, events, padding=padding_of(service, body))
    async with answers:
        return with_header(json_reply(await asked.reply.whole(answers)), draft, answers)


async def encoded(
    service: Service,
    messages: Sequence[Message],
    tools: ToolUse | None,
    template_args: dict[str, Any] | None,
    *,
    param: str = "messages",
    bounded: bool = True,
) -> list[int]:
    """The tokens of a conversation; one that is far longer than the context is refused, unless it is not ``bounded``.

    Raises ApiError, and PromptError with the words of the template.
    """
    tokenizer = service.tokenizer
    if tokenizer.chat_template is None:
        raise ApiError(400, "this model has no chat template: use /v1/completions", param=param)
    arguments = dict(template_args or {})
    if tools is not None:
        arguments["tools"] = tools.definitions
    if tokenizer.unread(arguments):
        text = "chat_template_kwargs has a name that the model's template does not read"
        raise ApiError(400, text, param="chat_template_kwargs", code="invalid_value")

    def tokens() -> list[int]:
        rendered = tokenizer.render_chat(conversation(messages), **arguments)
        if bounded:
            refuse_too_long(service, rendered.text, param)
        return rendered.encode()

    return await on_text_thread(tokens)


def _tools(service: Service, body: ChatBody, form: StructuredOutputsParams | None) -> ToolUse | None:
    if any(tool.type != "function" for tool in body.tools or ()):
        raise ApiError(400, "tools must be functions", param="tools", code="invalid_value")
    functions = None if body.tools is None else [tool.function for tool in body.tools]
    return tool_use(service, functions, body.tool_choice, body.parallel_tool_calls, form)


def _form(body: ChatBody) -> StructuredOutputsParams | None:
    asked = body.response_format
    if asked is None:
        return None
    schema = None if asked.json_schema is None else asked.json_schema.schema
    return form_of(asked.type, schema, "response_format.json_schema.schema")


def _logprobs(body: ChatBody) -> int | None:
    top = body.top_logprobs
    check_top_logprobs(top)
    if not body.logprobs:
        if top is not None:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
        return None
    return top or 0
