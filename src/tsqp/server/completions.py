"""POST /v1/completions: texts or tokens that are gone on with, whole or as a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from starlette.requests import Request
from starlette.responses import Response

from tsqp.api.text_threads import on_text_thread
from tsqp.server.answers import Answers, Asked, unless_left
from tsqp.server.body import read_body
from tsqp.server.completions_reply import Reply
from tsqp.server.completions_types import MAX_LOGPROBS, CompletionBody
from tsqp.server.errors import ApiError
from tsqp.server.json_reply import json_reply
from tsqp.server.params import (
    answer_tokens,
    check_choices,
    check_stream_options,
    of_choice,
    refuse_too_long,
    salt_of,
    sampling_params,
)
from tsqp.server.receipts import draft_of, repeatable, with_header, with_receipt
from tsqp.server.service import Service
from tsqp.server.streams import EventStream, padding_of

DEFAULT_TOKENS = 16  # as OpenAI's API has it


@dataclass(frozen=True)
class Prompt:
    """``text``: None where a client gave tokens."""

    tokens: list[int]
    text: str | None


async def create(service: Service, request: Request) -> Response:
    """The endpoint."""
    body = await read_body(service, request, CompletionBody)
    return await unless_left(request, _answered(service, request, body))


async def _answered(service: Service, request: Request, body: CompletionBody) -> Response:
    lora = service.adapter_of(body.model)
    given = listed(body.prompt)
    check_choices(service, body.choices, len(given))
    check_stream_options(body)
    _check(body)
    params = repeatable(service, sampling_params(body, logprobs=body.logprobs))
    if body.echo:
        params = replace(params, prompt_logprobs=body.logprobs)
    asked = 1 if body.max_tokens == 0 and body.echo else body.max_tokens
    special = body.add_special_tokens is not False
    prompts = [await on_text_thread(_encoded, service, one, special) for one in given]
    every = []
    default, choices = min(DEFAULT_TOKENS, service.settings.max_answer_tokens), len(prompts) * body.choices
    for prompt in prompts:
        most = answer_tokens(
            service, len(prompt.tokens), asked, default, param="max_tokens", prompt="prompt", choices=choices
        )
        bounded = replace(params, max_tokens=most)
        sampled = [of_choice(bounded, index) for index in range(body.choices)]
        every += [Asked(prompt.tokens, one, lora=lora, goes_on=True) for one in sampled]
    draft = await draft_of(service, request, "/v1/completions", body, every, body.choices)
    reply = Reply(service, body, [(prompt.tokens, prompt.text) for prompt in prompts])
    answers = await Answers.open(service, request, "completions", every, salt_of(body))
    if body.stream:
        events = with_receipt(reply.events(answers), draft, answers)
        return EventStream(service, answers, events, padding=padding_of(service, body))
    async with answers:
        return with_header(json_reply(await reply.whole(answers)), draft, answers)


def listed(prompt: object) -> Sequence[str | list[int]]:
    """Every prompt of a request. Raises ApiError."""
    prompts = [prompt] if isinstance(prompt, str) or _is_ids(prompt) else prompt
    every = prompts if isinstance(prompts, list) else []
    if every and (all(isinstance(one, str) for one in every) or all(map(_is_ids, every))):
        return every
    raise ApiError(
        400, "prompt must be a text, tokens, or a list of either that is not empty", param="prompt", code="invalid_type"
    )


def _is_ids(prompt: object) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(one) is int for one in prompt)


def _encoded(service: Service, prompt: str | list[int], special_tokens: bool) -> Prompt:
    """The tokens of a prompt: a text is taken as it is, and so are control tokens written in it."""
    if isinstance(prompt, list):
        if not all(0 <= token < service.vocab_size for token in prompt):
            text = f"prompt must have ids of tokens, which end at {service.vocab_size - 1} in this model"
            raise ApiError(400, text, param="prompt", code="invalid_value")
        return Prompt(prompt, None)
    refuse_too_long(service, prompt, "prompt")
    tokens = service.tokenizer.encode(prompt, special_tokens=special_tokens)
    if not tokens:
        raise ApiError(400, "prompt must not be empty", param="prompt", code="invalid_value")
    return Prompt(tokens, prompt)


def _check(body: CompletionBody) -> None:
    if body.logprobs is not None and not 0 <= body.logprobs <= MAX_LOGPROBS:
        text = f"logprobs must be at least 0 and at most {MAX_LOGPROBS}"
        raise ApiError(400, text, param="logprobs", code="invalid_value")
    if body.best_of is not None and body.best_of != body.choices:
        raise ApiError(
            400, "best_of must be n: all answers are returned", param="best_of", code="unsupported_parameter"
        )
