"""POST /tokenize and /detokenize: the tokens of a text or a conversation, and the text of tokens."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tsqp.api.text_threads import on_text_thread
from tsqp.server.body import Body, read_body
from tsqp.server.chat import encoded
from tsqp.server.chat_messages import Message
from tsqp.server.chat_types import Tool
from tsqp.server.errors import ApiError
from tsqp.server.json_reply import json_reply
from tsqp.server.params import TokenId
from tsqp.server.ranges import documented
from tsqp.server.service import Service
from tsqp.server.tools import MAX_TOOLS, tool_use


class TokenizeBody(Body, kw_only=True, frozen=True):
    """A ``prompt``, as in completions, or ``messages``, as in chat."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    messages: Annotated[list[Message], documented(minItems=1)] | None = None
    tools: Annotated[list[Tool], documented(minItems=1, maxItems=MAX_TOOLS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Tokens(msgspec.Struct, frozen=True):
    """The ids, and the most tokens of a prompt and its answer."""

    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeBody(Body, kw_only=True, frozen=True):
    """Ids of tokens."""

    tokens: list[TokenId]
    model: str | None = None


class Text(msgspec.Struct, frozen=True):
    """The text of tokens, without control tokens."""

    prompt: str


class TokenizerInfo(msgspec.Struct, frozen=True):
    """What clients need that make prompts of conversations themselves; null where the checkpoint says nothing."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


async def tokenize(service: Service, request: Request) -> Response:
    """The tokens that a prompt or a conversation has."""
    body = await read_body(service, request, TokenizeBody)
    _check_name(service, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "either prompt or messages must be given", param="prompt")
    if body.messages is not None:
        functions = None if body.tools is None else [tool.function for tool in body.tools]
        tools = tool_use(service, functions, None, None)
        tokens = await encoded(service, body.messages, tools, body.chat_template_kwargs, bounded=False)
    else:
        special = body.add_special_tokens is not False
        tokens = await on_text_thread(service.tokenizer.encode, body.prompt or "", special_tokens=special)
    return json_reply(Tokens(tokens, len(tokens), service.context))


async def detokenize(service: Service, request: Request) -> Response:
    """The text of tokens."""
    body = await read_body(service, request, DetokenizeBody)
    _check_name(service, body.model)
    return json_reply(Text(await on_text_thread(_text_of, service, body.tokens)))


def _text_of(service: Service, tokens: list[int]) -> str:
    if not all(0 <= token < service.vocab_size for token in tokens):
        text = f"tokens must be ids of tokens, which end at {service.vocab_size - 1} in this model"
        raise ApiError(400, text, param="tokens", code="invalid_value")
    return service.tokenizer.decode(tokens)


async def tokenizer_info(service: Service, _request: Request) -> Response:
    """Texts of control tokens, and the source of the chat template. Nothing in it is a secret: it is the model's."""
    tokenizer = service.tokenizer
    bos, eos, pad, unk = (tokenizer.special_tokens.get(f"{name}_token") for name in ("bos", "eos", "pad", "unk"))
    return json_reply(TokenizerInfo(bos, eos, pad, unk, tokenizer.chat_template))


def _check_name(service: Service, name: str | None) -> None:
    if name is not None:
        service.adapter_of(name)
