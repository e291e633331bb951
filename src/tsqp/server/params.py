"""What a client says about sampling, as the engine takes it."""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b
from typing import Annotated

import msgspec

from tsqp.server.body import Body
from tsqp.server.errors import ApiError
from tsqp.server.ranges import documented
from tsqp.server.service import Service
from tsqp.trusted.engine.sampling_params import (
    MAX_BIAS,
    MAX_PENALTY,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    SamplingParams,
)
from tsqp.trusted.engine.structured_outputs import StructuredOutputsParams

MAX_SALT = 256  # characters
MAX_TOP_LOGPROBS = 20

Temperature = Annotated[float, documented(minimum=0, maximum=2)]
TopP = Annotated[float, documented(exclusiveMinimum=0, maximum=1)]
MinP = Annotated[float, documented(minimum=0, exclusiveMaximum=1)]
TopK = Annotated[int, documented(minimum=-1)]
RepetitionPenalty = Annotated[float, documented(minimum=1 / MAX_PENALTY, maximum=MAX_PENALTY)]
Penalty = Annotated[float, documented(minimum=-2, maximum=2)]
Bias = Annotated[float, documented(minimum=-MAX_BIAS, maximum=MAX_BIAS)]
Seed = Annotated[int, documented(minimum=-(2**63), maximum=2**63 - 1)]
Salt = Annotated[str, documented(maxLength=MAX_SALT)]
Stop = Annotated[str, documented(minLength=1, maxLength=MAX_STOP_CHARACTERS)]
TokenCount = Annotated[int, documented(minimum=1)]
TopCount = Annotated[int, documented(minimum=0, maximum=MAX_TOP_LOGPROBS)]
TokenId = Annotated[int, documented(minimum=0)]


class StreamOptions(msgspec.Struct, kw_only=True, frozen=True):
    """``include_obfuscation``: whether events are padded; None for what the server does.

    ``include_receipt`` is not OpenAI's: whether a receipt comes last.
    """

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    include_receipt: bool | None = None


class SamplingBody(Body, kw_only=True, frozen=True):
    """The fields that all endpoints share which make text. Those from ``top_k`` on are not in each API of OpenAI's."""

    model: str
    temperature: Temperature | None = None
    top_p: TopP | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    seed: Seed | None = None
    cache_salt: Salt | None = None


class ChoicesBody(SamplingBody, kw_only=True, frozen=True):
    """What chat and completions have beyond that."""

    n: TokenCount | None = None
    stop: Stop | Annotated[list[Stop], documented(maxItems=MAX_STOPS)] | None = None
    max_tokens: TokenCount | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[int, Bias] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return 1 if self.n is None else self.n


def sampling_params(
    body: SamplingBody, *, logprobs: int | None = None, form: StructuredOutputsParams | None = None
) -> SamplingParams:
    """All but ``max_tokens``, which the prompt bounds. Raises ApiError and OptionError with the name of the field."""
    given = {
        name: getattr(body, name)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "seed")
        if getattr(body, name) is not None
    }
    if body.top_k is not None:
        given["top_k"] = 0 if body.top_k == -1 else body.top_k  # some clients say so: off
    if isinstance(body, ChoicesBody):
        for name in ("frequency_penalty", "presence_penalty", "logit_bias", "stop", "stop_token_ids", "ignore_eos"):
            if getattr(body, name) is not None:
                given[name] = getattr(body, name)
    return SamplingParams(**{"temperature": 1.0, **given}, logprobs=logprobs, structured_outputs=form)


def of_choice(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters of one of several choices: each has a seed of its own, that of the first is the one given.

    So the first choice is the answer that ``n = 1`` gives, and the others are the same on every run.
    """
    if params.seed is None or index == 0:
        return params
    key = params.seed.to_bytes(8, "little", signed=True)
    digest = blake2b(index.to_bytes(8, "little"), key=key, digest_size=8).digest()
    return replace(params, seed=int.from_bytes(digest, "little", signed=True))


def check_choices(service: Service, n: int, prompts: int = 1) -> None:
    """Raises ApiError for more answers than one request may ask for."""
    settings = service.settings
    if not 1 <= n <= settings.max_n:
        raise ApiError(400, f"n must be at least 1 and at most {settings.max_n}", param="n", code="invalid_value")
    if n * prompts > settings.max_choices:
        raise ApiError(
            400, f"a request may ask for at most {settings.max_choices} answers", param="n", code="invalid_value"
        )


def check_stream_options(body: SamplingBody) -> None:
    """Raises ApiError for options of a stream where there is none."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(
            400, "stream_options is for requests with stream: true", param="stream_options", code="invalid_value"
        )


def check_top_logprobs(top: int | None) -> None:
    """Raises ApiError for more log-probabilities of a token than are told."""
    if top is not None and not 0 <= top <= MAX_TOP_LOGPROBS:
        text = f"top_logprobs must be at least 0 and at most {MAX_TOP_LOGPROBS}"
        raise ApiError(400, text, param="top_logprobs", code="invalid_value")


def answer_tokens(
    service: Service, prompt_tokens: int, asked: int | None, default: int, *, param: str, prompt: str, choices: int = 1
) -> int:
    """The most tokens of an answer, one of ``choices``; ``default`` where nothing is asked for, or as there is room.

    Raises ApiError where prompt and answer are longer than the context.
    """
    context = service.context
    if asked is not None and asked < 1:
        raise ApiError(400, f"{param} must be at least 1", param=param, code="invalid_value")
    if prompt_tokens >= context or prompt_tokens + (asked or 0) > context:
        raise ApiError(
            400,
            f"this model's maximum context length is {context} tokens, the answer included: the prompt has "
            f"{prompt_tokens}, and {asked or 'some'} are asked for",
            param=prompt if prompt_tokens >= context else param,
            code="context_length_exceeded",
        )
    return asked or max(1, min(default, service.room(choices) - prompt_tokens))


def refuse_too_long(service: Service, text: str, param: str) -> None:
    """Raises ApiError for a text that has more tokens than the context, before it is tokens."""
    if service.tokenizer.has_more_tokens(text, service.context):
        message = f"this model's context holds {service.context} tokens, the answer included: the prompt has more"
        raise ApiError(400, message, param=param, code="context_length_exceeded")


def salt_of(body: SamplingBody) -> str:
    """What narrows the scope in which caches are found; the tenant bounds it."""
    salt = body.cache_salt or ""
    if len(salt) > MAX_SALT:
        text = f"cache_salt must have at most {MAX_SALT} characters"
        raise ApiError(400, text, param="cache_salt", code="invalid_value")
    return salt
